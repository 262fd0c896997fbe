# The gateway, and the migration job: no torch, no compiler, no root.
#   docker build -f docker/gateway.Dockerfile -t pawl-gateway:0.1.0 .
FROM python:3.11-bookworm AS build
RUN python -m venv /opt/pawl
ENV PATH=/opt/pawl/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# Requirements first: a change of code reuses this layer.
COPY requirements/base.txt requirements/compile.txt requirements/
RUN pip install --no-deps -r requirements/base.txt && \
    pip install --no-deps --target /opt/compiler -r requirements/compile.txt
COPY . .
# Leave the last command out for a gateway that is interpreted.
RUN pip install --no-deps . && \
    PYTHONPATH=/opt/compiler python scripts/compile_hot_path.py --into /opt/pawl/lib/python3.11/site-packages

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --create-home --home-dir /var/lib/pawl pawl
COPY --from=build /opt/pawl /opt/pawl
ENV PATH=/opt/pawl/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/pawl
EXPOSE 8080
ENTRYPOINT ["pawl"]
CMD ["serve"]
