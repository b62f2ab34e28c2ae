# docker build -t cleanrl-crypto .
# docker run --rm -v "$PWD/runs:/app/runs" cleanrl-crypto            # make run
# docker run --rm -v "$PWD/runs:/app/runs" cleanrl-crypto make run ARGS="--seed 3"
# pip's torch on Linux brings CUDA libraries; a CPU build is smaller:
# docker build --build-arg TORCH="torch==2.13.0 --index-url URL_OF_THE_CPU_BUILDS" -t cleanrl-crypto .
FROM python:3.11-slim
# libgomp1: without it Numba falls back to a scheduler that two threads may not call at once
RUN apt-get update \
    && apt-get install -y --no-install-recommends make libgomp1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
ARG TORCH=torch==2.13.0
ENV PIP_NO_CACHE_DIR=1
COPY Makefile requirements.txt ./
RUN make venv TORCH="$TORCH"
COPY . .
# a clone that is younger than the cached layer above has the same requirements
RUN touch .venv/.run
VOLUME /app/runs
CMD ["make", "run"]
