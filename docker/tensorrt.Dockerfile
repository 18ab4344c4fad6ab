# TensorRT for x86-64 with an NVIDIA card: edgedeploy itself, and the device on which it builds and measures.
#   docker build -f docker/tensorrt.Dockerfile -t edgedeploy-tensorrt .
#   docker run --rm --gpus all -v "$PWD:/work" edgedeploy-tensorrt doctor
# The base carries TensorRT 10.11, CUDA 12.9 and Python 3.12; its Python module for TensorRT is seen from the environment.
# What runs here must not be newer than the driver of the host allows: NVIDIA's container release notes say which.
FROM nvcr.io/nvidia/tensorrt:25.06-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# What pip installs must not replace what the base pins for itself: an environment of its own that looks into the base's.
RUN python3 -m venv --system-site-packages /opt/edgedeploy
ENV PATH=/opt/edgedeploy/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=

WORKDIR /opt/source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY edgedeploy edgedeploy
COPY targets targets
RUN pip install -c constraints.txt torch && \
    pip install -c constraints.txt '.[torch,onnxruntime,tensorrt,ssh]' && \
    python -c 'import tensorrt; assert tensorrt.__version__.startswith("10.")'

RUN useradd --create-home --uid 10001 edge
USER 10001
WORKDIR /work
ENTRYPOINT ["edgedeploy"]
CMD ["--help"]
