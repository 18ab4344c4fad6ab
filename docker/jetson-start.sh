#!/bin/bash
# Starts the SSH server of docker/jetson.Dockerfile and docker/device.Dockerfile; makes its host key when there is none yet.
set -euo pipefail

key=/home/edge/sshd/host_key
if [[ ! -s /etc/edge/authorized_keys ]]; then
    echo "mount your public key: -v ~/.ssh/id_ed25519.pub:/etc/edge/authorized_keys:ro" >&2
    exit 1
fi
[[ -f $key ]] || ssh-keygen -q -t ed25519 -N "" -f "$key"
echo "host key: $(ssh-keygen -lf "$key.pub")"
exec /usr/sbin/sshd -D -e -f /etc/edge/sshd.conf
