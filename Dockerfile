# remax-lightning with its command as the entrypoint, as a user without privileges. docs/docker.md says how to run it.
#   docker build --tag remax-lightning .
#   docker build --tag remax-lightning:cuda --build-arg DEVICE=cuda .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# Compilers for kernels that Triton and DeepSpeed build at run time, git for the hyper-parameters of a run in a checkout.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git tini \
    && rm -rf /var/lib/apt/lists/*

# Names of extras in pyproject.toml, with commas between them.
ARG EXTRAS=loggers,verify
WORKDIR /opt/remax-lightning
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY remax_lightning remax_lightning
# cpu or cuda: the wheels of PyPI bring CUDA with them, those of the index for CPUs do without that download.
ARG DEVICE=cpu
RUN case "${DEVICE}" in \
        cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        cuda) ;; \
        *) echo "DEVICE must be cpu or cuda, got ${DEVICE}" >&2; exit 1 ;; \
    esac \
    && python -m pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

# Files of a run in a mounted folder belong to this user: pass --build-arg UID=$(id -u).
ARG UID=1000
RUN useradd --create-home --uid "${UID}" remax \
    && mkdir /work \
    && chown remax /work
USER remax
WORKDIR /work
ENV TOKENIZERS_PARALLELISM=false

# tini passes SIGTERM on, after which a run saves a checkpoint, and waits for the processes of a run.
ENTRYPOINT ["tini", "--", "remax"]
CMD ["--help"]
