# The server in a container:
#
#     docker build -t miniflux .                                                for CPUs
#     docker build -t miniflux:cuda --build-arg TORCH=cu130 .                   for GPUs of NVIDIA
#     docker run --rm -v miniflux:/data miniflux keys add me
#     docker run -d --name miniflux --init -p 127.0.0.1:8000:8000 -v miniflux:/data miniflux
#
# PyTorch's wheels bring the libraries of CUDA, so that one base does for both; the driver is the host's (docker run --gpus all).

# Any image of Debian or Ubuntu that has Python 3.10 or later, or can install it; such as one of nvidia/cuda.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# Which wheels of PyTorch: cpu, or a version of CUDA as PyTorch names it, such as cu130.
ARG TORCH=cpu
# With the page of `serve --ui`: serve,postgres,ui.
ARG EXTRAS=serve,postgres
RUN command -v pip3 >/dev/null \
    || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /opt/miniflux
WORKDIR /build
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE constraints.txt ./
COPY src ./src
RUN /opt/miniflux/bin/pip install --no-cache-dir -c constraints.txt \
    --extra-index-url "https://download.pytorch.org/whl/${TORCH}" ".[${EXTRAS}]"

FROM ${BASE}
RUN command -v python3 >/dev/null \
    || (apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*)
COPY --from=build /opt/miniflux /opt/miniflux
RUN useradd --system --uid 10001 --home-dir /data --shell /usr/sbin/nologin miniflux \
    && install -d -o miniflux -g miniflux -m 0700 /data && install -d /weights
ENV PATH=/opt/miniflux/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MINIFLUX_DATA=/data \
    MINIFLUX_WEIGHTS=/weights
USER 10001
VOLUME /data
EXPOSE 8000
# Loading torch takes some seconds on a machine that is busy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["miniflux"]
# Within the container everybody; who reaches it from outside is what -p says.
CMD ["serve", "--host", "0.0.0.0"]
