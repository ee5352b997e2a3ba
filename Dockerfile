# A container that trains: docker build --tag prelude .
#
#   docker run --rm --gpus all --shm-size=8g --user "$(id -u):$(id -g)" --volume /data:/data --volume "$PWD:/workspace" prelude \
#       deepspeed --num_gpus 8 --module prelude.launch.pretrain --config mae_vit_base 'data.shards=/data/train-*.tar'
#
# The first stage builds the wheel and an environment that it is installed in; the second has that environment and the
# libraries of CUDA, no compiler (which train.compile=true would need), no sources, and a user who is not root. Of the
# extras it has those of EXTRAS: docker build --build-arg EXTRAS=parquet,gcs,wandb installs others.

ARG CUDA=13.0.2
ARG UBUNTU=24.04

FROM nvidia/cuda:${CUDA}-runtime-ubuntu${UBUNTU} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/prelude
ENV PATH=/opt/prelude/bin:$PATH
# What is not ours first: this layer stays while only our code changes.
ARG EXTRAS=parquet,zarr,tiff,http,s3,onnx,transformers
COPY pyproject.toml README.md LICENSE /src/
RUN python -c "import tomllib; project = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']; \
    extras = [line for name in '${EXTRAS}'.split(',') for line in project['optional-dependencies'][name]]; \
    print('\n'.join(project['dependencies'] + extras))" > /tmp/requirements.txt \
    && pip install --no-cache-dir --requirement /tmp/requirements.txt
COPY src /src/src
COPY configs /src/configs
COPY data /src/data
COPY pretrain /src/pretrain
COPY objectives /src/objectives
COPY checkpoints /src/checkpoints
COPY evaluators /src/evaluators
COPY launch /src/launch
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /tmp/wheel /src \
    && pip install --no-cache-dir --no-deps /tmp/wheel/*.whl \
    && pip check \
    && prelude --version

FROM nvidia/cuda:${CUDA}-runtime-ubuntu${UBUNTU}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1100 prelude
COPY --from=build /opt/prelude /opt/prelude
# The home, with the cache in it, of a user whom only --user names: anybody may write there. Such a user has no entry in
# /etc/passwd, and USER is what libraries that ask for a name are told instead.
RUN install --directory --mode 1777 /workspace
ENV PATH=/opt/prelude/bin:$PATH HOME=/workspace USER=prelude
USER 1100
WORKDIR /workspace
CMD ["prelude", "doctor"]
