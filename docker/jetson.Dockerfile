# A Jetson (JetPack 6.1 or later) as a device of edgedeploy in a box: the device half alone, reached over SSH.
#   docker build -f docker/jetson.Dockerfile -t edgedeploy-jetson .        on the Jetson
#   docker run --rm --runtime nvidia -p 2222:2222 -v ~/.ssh/id_ed25519.pub:/etc/edge/authorized_keys:ro \
#       -v /var/lib/nvpmodel:/var/lib/nvpmodel:ro -v /etc/nvpmodel.conf:/etc/nvpmodel.conf:ro \
#       -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro edgedeploy-jetson
# In lab.toml: transport = "ssh", host = "<the Jetson>", port = 2222, user = "edge".
# Nothing of edgedeploy is in the image: its runner, builder and session are shipped by digest when they are needed.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Versions are those of the base's Ubuntu 22.04; numpy before 2, with which TensorRT 10.3's module was made.
# hadolint ignore=DL3008
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends openssh-server python3 python3-numpy && \
    apt-get clean && \
    rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* && \
    python3 -c 'import numpy, tensorrt; assert tensorrt.__version__.startswith("10.3")'

# The server runs as this user and lets in nobody else, by key alone; its own key is made when it first starts.
# A password that nothing matches, because an account without one is locked, and sshd refuses those.
RUN useradd --create-home --password '*' --uid 10001 --groups video --shell /bin/bash edge && \
    install -d -o edge -g edge -m 0700 /home/edge/sshd
COPY docker/jetson-sshd.conf /etc/edge/sshd.conf
COPY --chmod=0755 docker/jetson-start.sh /usr/local/bin/jetson-start

USER 10001
WORKDIR /home/edge
EXPOSE 2222
ENTRYPOINT ["jetson-start"]
