# The retraining job: TRL on CUDA torch. The node's driver is mounted by the NVIDIA container runtime.
#   docker build -f docker/train.Dockerfile -t pawl-train:0.1.0 .
FROM python:3.11-slim-bookworm AS build
RUN python -m venv /opt/pawl
ENV PATH=/opt/pawl/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# Give PyTorch's index of wheels for another CUDA version where the nodes' driver is older than the default asks for.
ARG TORCH_INDEX_URL=""
COPY requirements/train.txt requirements/
# torch comes with its own dependencies (the CUDA libraries of its build); everything else is in the lock.
RUN grep '^torch==' requirements/train.txt > torch.txt \
    && pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r torch.txt \
    && pip install --no-deps -r requirements/train.txt
COPY . .
RUN pip install --no-deps .

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --create-home --home-dir /var/lib/pawl pawl
COPY --from=build /opt/pawl /opt/pawl
ENV PATH=/opt/pawl/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /var/lib/pawl
ENTRYPOINT ["pawl"]
CMD ["retrain", "run", "--if-due"]
