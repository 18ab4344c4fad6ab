# An aarch64 board as a device of edgedeploy in a box, for people without a board: arm64 Debian, reached over SSH.
#   python -m tests.testbed identity pi4 /tmp/board
#   docker build --platform linux/arm64 -f docker/device.Dockerfile -t edgedeploy-device .
#   docker run --rm --platform linux/arm64 -p 127.0.0.1:2222:2222 -v ~/.ssh/id_ed25519.pub:/etc/edge/authorized_keys:ro \
#       -v /tmp/board/cpuinfo:/proc/cpuinfo:ro -v /tmp/board/sys:/sys:ro edgedeploy-device
# In lab.toml: transport = "ssh", host = "127.0.0.1", port = 2222, user = "edge".
# On an x86 machine its programs run under qemu, which docker needs to know: apt install qemu-user-static. The two files
# of /proc and /sys are not decoration there: runtimes that find an x86 /proc/cpuinfo crash when they are imported.
# Nothing of edgedeploy is in the image: its runner and sessions are shipped by digest when they are needed.
FROM debian:bookworm-20250520-slim

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# What runtimes' wheels link to beyond libc, and the Python that runs them.
# hadolint ignore=DL3008
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        libgomp1 libstdc++6 openssh-server procps python3 && \
    apt-get clean && \
    rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*

# The server runs as this user and lets in nobody else, by key alone; its own key is made when it first starts.
# A password that nothing matches, because an account without one is locked, and sshd refuses those.
RUN useradd --create-home --password '*' --uid 10001 --groups video --shell /bin/bash edge && \
    install -d -o edge -g edge -m 0700 /home/edge/sshd
COPY docker/jetson-sshd.conf /etc/edge/sshd.conf
COPY --chmod=0755 docker/jetson-start.sh /usr/local/bin/device-start

USER 10001
WORKDIR /home/edge
EXPOSE 2222
ENTRYPOINT ["device-start"]
