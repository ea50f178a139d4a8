#!/bin/sh
# The machine's first process: gets the sources from the second disk, runs the tests, switches the machine off.
# Debian's initramfs has mounted /proc, /sys, /dev and /run, the last without exec, as on any Debian machine.
#   first serial port    the kernel's messages
#   second               what the tests print
#   third                the tests' exit status

export HOME=/root LC_ALL=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
for port in /dev/ttyS1 /dev/ttyS2; do stty -F "$port" raw -echo; done
exec </dev/null >/dev/ttyS1 2>&1

hostname podwall-vm
ip link set lo up
# sctp before nf_conntrack: a kernel that has both. The nft modules come when a table asks for them, except
# that a table with NAT in family inet needs this one first.
modprobe -a sctp nft_chain_nat
ulimit -n 524288
tar -xf /dev/vdb -C /
sh /podwall-tests.sh
status=$?

exec >/dev/console 2>&1
echo "$status" >/dev/ttyS2
echo o >/proc/sysrq-trigger
sleep 60
