#!/bin/sh
# First process of the engine's namespaces: builds the engine's view of the machine and starts dockerd in it.
#   engine.sh TREE STATE DATA    Debian tree with Docker, directory for sockets, directory for images and containers
# It runs in network, mount and process namespaces of its own, so that its death takes everything with it.
set -eu
tree=$1 state=$2 data=$3
root=$state/root

ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding

# The tree is shared by all runs: what the engine writes into it goes to memory and ends with it.
mkdir -p "$root"
mount -t tmpfs -o size=64m podwall "$root"
mkdir "$root/upper" "$root/work" "$root/new"
mount -t overlay -o "lowerdir=$tree,upperdir=$root/upper,workdir=$root/work" overlay "$root/new"
cd "$root/new"
mount -t proc proc proc
mount -t tmpfs -o mode=755 podwall run
mount --rbind /dev dev
# A sysfs of this network namespace; the host's cgroup hierarchies, but never v2 beside v1: nodes would share it.
mount -t sysfs sysfs sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup
if mountpoint -q sys/fs/cgroup/unified; then umount sys/fs/cgroup/unified; fi
mkdir -p ".$state" ".$data" old
mount --bind "$state" ".$state"
mount --bind "$data" ".$data"
if [ -d /lib/modules ]; then mkdir -p lib/modules; mount --bind /lib/modules lib/modules; fi
pivot_root . old
umount -l old

dockerd --host "unix://$state/docker.sock" --data-root "$data" --exec-root /run/docker --pidfile /run/docker.pid \
    --storage-driver overlay2 --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent /podwall \
    --oom-score-adjust 0 --bip 172.29.0.1/24 --experimental --ip6tables \
    --add-runtime "podwall=$state/runtime" --default-runtime podwall &
trap 'kill -TERM $!' TERM INT
while kill -0 $! 2>/dev/null; do wait $! || true; done
