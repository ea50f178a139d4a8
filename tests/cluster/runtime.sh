#!/bin/sh
# runc, asked for no capability that this machine's sandbox lacks: `docker run --privileged` asks for all.
# Privileged containers get theirs from config.json, privileged `docker exec` from the file after --process.
lacking='["CAP_SYS_RESOURCE"]'
word= file=
for next in "$@"; do
    case $word in
        --bundle | -b) file=$next/config.json ;;
        --process | -p) file=$next ;;
    esac
    word=$next
done
if [ -n "$file" ] && [ -f "$file" ]; then
    jq --argjson lacking "$lacking" '
        def without: if type == "object" then map_values(if type == "array" then . - $lacking else . end) else . end;
        if has("process") then .process.capabilities |= without else .capabilities |= without end
    ' "$file" > "$file.podwall" && cat "$file.podwall" > "$file" && rm "$file.podwall"
fi
exec /usr/sbin/runc "$@"
