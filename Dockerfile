# syntax=docker/dockerfile:1
# NeMo's image: torch, Transformer Engine, Apex, Megatron-Core (and vLLM) built by NVIDIA to agree with
# each other and with its CUDA. None of them is installed here: they are looked at before and after.
#   docker build --build-arg REVISION="$(git rev-parse HEAD)" -t megatron-lopd .
#   docker run --gpus all --ipc=host -v "$PWD:/workspace" megatron-lopd run recipe.yaml
ARG BASE_IMAGE=nvcr.io/nvidia/nemo
ARG BASE_TAG=26.06
FROM ${BASE_IMAGE}:${BASE_TAG}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# vLLM is the base's own, so it shares the base's torch, and no environment of its own is made. Would it ask
# for another transformers than this package, the install below stops; `engine.vllm.python` is then the way out.

WORKDIR /opt/megatron-lopd

# What must not change, as the base has it: everything that holds compiled code against its torch or CUDA.
# torch and Megatron-Core must be there; the others are kept as found, absent included.
COPY tools/image/pinned.py tools/image/
RUN python tools/image/pinned.py > /opt/pinned-before.txt && cat /opt/pinned-before.txt

# The light dependencies, under the base's own constraints (where its torch came with any) AND the versions just
# read: would one of them need another torch or transformers, pip stops here, instead of replacing it. They
# change seldom, so they stand before the source. `--python`: NeMo's Python is an environment without a pip.
COPY requirements-image.txt ./
RUN mkdir -p /etc/pip && touch /etc/pip/constraint.txt \
    && pip --python "$(command -v python)" install --constraint /etc/pip/constraint.txt \
        --constraint /opt/pinned-before.txt --requirement requirements-image.txt

COPY pyproject.toml README.md LICENSE ./
COPY megatron_lopd megatron_lopd/
COPY tools tools/
COPY launcher launcher/
COPY examples examples/
# Only setuptools is fetched, to build with, in isolation: the base's constraints are not about it.
RUN env --unset=PIP_CONSTRAINT pip --python "$(command -v python)" install --no-deps . \
    && python tools/image/pinned.py > /opt/pinned-after.txt \
    && diff /opt/pinned-before.txt /opt/pinned-after.txt

# Not root: a run writes as whoever started it (`--user "$(id -u):$(id -g)"` for another uid). That one has no
# name here and no home: compiled kernels and caches go where anybody may write, whatever the base has set.
ARG LOPD_UID=10001
RUN useradd --create-home --shell /bin/bash --uid "${LOPD_UID}" lopd \
    && install --directory --owner lopd --group lopd /workspace \
    && install --directory --mode=1777 /scratch
ENV USER=lopd \
    HOME=/scratch \
    XDG_CACHE_HOME=/scratch/cache \
    HF_HOME=/scratch/huggingface \
    MPLCONFIGDIR=/scratch/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/scratch/inductor \
    TRITON_CACHE_DIR=/scratch/triton \
    VLLM_CACHE_ROOT=/scratch/vllm
USER ${LOPD_UID}
WORKDIR /workspace

# There is no GPU while an image is built, so this proves imports and versions; with one, it is HEALTHCHECK's.
# What it leaves in /scratch would be this uid's, and another could not write beside it.
RUN lopd doctor && find /scratch -mindepth 1 -delete

ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron-lopd" \
      org.opencontainers.image.description="Offline on-policy distillation on Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"

HEALTHCHECK --interval=10m --timeout=2m --start-period=2m CMD ["lopd", "doctor"]
ENTRYPOINT ["lopd"]
CMD ["doctor"]
