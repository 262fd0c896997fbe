# The background worker: Detoxify on the CPU.
#   docker build -f docker/worker.Dockerfile -t pawl-worker:0.1.0 --build-arg TORCH_INDEX_URL=<PyTorch's index of CPU wheels> .
FROM python:3.11-slim-bookworm AS build
RUN python -m venv /opt/pawl
ENV PATH=/opt/pawl/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# Without it the image still works, but carries several gigabytes of CUDA libraries that the worker never uses.
ARG TORCH_INDEX_URL=""
COPY requirements/worker.txt requirements/
# torch comes with its own dependencies, since they differ between its CPU and CUDA builds; everything else is in the lock.
RUN grep '^torch==' requirements/worker.txt > torch.txt \
    && pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} -r torch.txt \
    && pip install --no-deps -r requirements/worker.txt
COPY . .
RUN pip install --no-deps .

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --create-home --home-dir /var/lib/pawl pawl
COPY --from=build /opt/pawl /opt/pawl
ENV PATH=/opt/pawl/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/pawl
EXPOSE 9101
ENTRYPOINT ["pawl"]
CMD ["worker"]
