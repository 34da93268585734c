# villa with easy-VQA and all that its recipes need. For CPUs, and for GPUs by CUDA 13.0:
#   docker build -t villa .
#   docker build -t villa:cuda --build-arg TORCH=cu130 .
# A run that keeps its files (GPUs: --gpus all, which needs the NVIDIA container toolkit):
#   docker run --rm -v "$PWD:/work" -u "$(id -u):$(id -g)" villa config=villa/easy_vqa
FROM python:3.11-slim-bookworm

# Build of torch, a folder of https://download.pytorch.org/whl
ARG TORCH=cpu

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Torch is the largest layer: it is made anew only when the versions change.
COPY constraints.txt /tmp/constraints.txt
RUN pip install "$(grep '^torch==' /tmp/constraints.txt)" --index-url "https://download.pytorch.org/whl/${TORCH}"

COPY . /tmp/villa
RUN pip install -c /tmp/constraints.txt '/tmp/villa[demo,lora]' && rm -r /tmp/villa

# Caches of a user without a home folder
ENV VILLA_CACHE=/tmp/villa-cache HF_HOME=/tmp/huggingface
WORKDIR /work
USER 1000

ENTRYPOINT ["villa_run"]
CMD ["--help"]
