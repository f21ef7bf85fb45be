# The images: `docker build .` makes the trainer, `--target mlflow` the tracking server. docs/deploy.md shows their use.

# Debian or Ubuntu with Python 3.11 or newer and its venv module.
ARG BASE_IMAGE=python:3.11-slim

# -- what both images begin with -----------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS base
# tini is process 1: it hands signals on and reaps orphans. Python as process 1 would be deaf to SIGTERM while it loads.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 dmaml \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /home/dmaml --shell /usr/sbin/nologin dmaml
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true

# -- where packages are built; nothing of it is in the images but what is copied from it ------------------------------
FROM ${BASE_IMAGE} AS builder
ARG UV_VERSION=0.13.9
# learn2learn is C that is compiled here. Images of python.org bring Python's headers along, Debian's Python does not.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && if ! python3 -c "import sysconfig; open(sysconfig.get_path('include') + '/Python.h').close()" 2>/dev/null; then \
      apt-get install -y --no-install-recommends python3-dev; fi \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/uv \
 && /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}" \
 && /opt/uv/bin/uv venv --no-cache --python python3 /opt/venv
ENV PATH=/opt/uv/bin:${PATH} \
    VIRTUAL_ENV=/opt/venv \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never
WORKDIR /build
COPY pyproject.toml requirements.txt ./

FROM builder AS server-packages
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --constraints requirements.txt mlflow "psycopg[binary]"

FROM builder AS trainer-packages
# Empty: PyTorch as the package index has it, on Linux with CUDA, which runs on CPUs as well. "cpu": without CUDA, from
# PyTorch's own index, which uv knows; or a version of CUDA, such as cu130.
ARG TORCH_BACKEND=""
# Any word here puts in what workers that come and go need, which is there for x86-64 only.
ARG ELASTIC=""
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --constraints requirements.txt --requirements pyproject.toml --extra onnx --extra learn2learn \
      ${ELASTIC:+--extra elastic} learn2learn \
      ${TORCH_BACKEND:+--torch-backend "${TORCH_BACKEND}"}

FROM builder AS package
COPY README.md LICENSE ./
COPY dmaml_pl dmaml_pl
COPY data_modules data_modules
COPY configs configs
RUN --mount=type=cache,target=/root/.cache/uv uv pip install --no-deps --target /opt/package .

# -- the tracking server ---------------------------------------------------------------------------------------------
FROM base AS mlflow
COPY --from=server-packages /opt/venv /opt/venv
RUN mkdir -p /mlflow/artifacts && chown -R 10001:10001 /mlflow
# Jobs are a queue for language models' judges: two processes more.
ENV HOME=/tmp \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    MLFLOW_BACKEND_STORE_URI=sqlite:////mlflow/mlflow.db \
    MLFLOW_ARTIFACTS_DESTINATION=/mlflow/artifacts
WORKDIR /mlflow
VOLUME /mlflow
EXPOSE 5000
USER 10001:10001
# -g: the server is several processes, and all of them are told to end.
ENTRYPOINT ["tini", "-g", "--", "mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]
CMD ["--workers", "2"]

# -- the trainer -----------------------------------------------------------------------------------------------------
FROM base AS trainer
COPY --from=trainer-packages /opt/venv /opt/venv
# model.compile needs a C++ compiler while it runs; any word here puts one in. Without, trainings go on uncompiled.
ARG COMPILER=""
# hadolint ignore=DL3008
RUN if [ -n "${COMPILER}" ]; then \
      apt-get update \
      && apt-get install -y --no-install-recommends g++ libc6-dev \
      && if ! python3 -c "import sysconfig; open(sysconfig.get_path('include') + '/Python.h').close()" 2>/dev/null; then \
           apt-get install -y --no-install-recommends python3-dev; fi \
      && rm -rf /var/lib/apt/lists/*; fi
# The package has a place and a layer of its own, as it changes more often than the 6 GB below it. It is copied, as podman
# does not see that a stage has changed which is only mounted.
RUN python -c "import pathlib, sysconfig; \
    pathlib.Path(sysconfig.get_path('purelib'), 'dmaml_pl.pth').write_text('/opt/package')"
COPY --from=package /opt/package /opt/package
WORKDIR /app
COPY configs configs
# What is written: trainings, data sets, and what is kept between trainings (rendered letters, compiled graphs). The
# commit is told here, as podman looks for a changed argument at RUN only.
ARG GIT_COMMIT=""
RUN mkdir -p mlruns data /home/dmaml && chown 10001:10001 mlruns data /home/dmaml
VOLUME ["/app/mlruns", "/app/data", "/home/dmaml"]
# Which GPUs a container sees is not set here, as it would overrule what a cluster has dealt out.
ENV HOME=/home/dmaml \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/package/bin:${PATH} \
    DMAML_GIT_COMMIT=${GIT_COMMIT}
LABEL org.opencontainers.image.title="dmaml_pl" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${GIT_COMMIT}"
USER 10001:10001
ENTRYPOINT ["tini", "--", "dmaml"]
CMD ["--help"]
