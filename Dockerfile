# The server in a container: `docker compose up`, or
#   docker build -t edgellm . && docker run -e EDGELLM_API_KEY -p 127.0.0.1:8080:8080 -v edgellm:/data edgellm
FROM python:3.13-slim AS wheel
WORKDIR /source
COPY pyproject.toml setup.py models.toml README.md LICENSE ./
COPY edgellm edgellm
COPY formats formats
COPY kernels kernels
COPY tui tui
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.13-slim
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir "edgellm[server] @ file://$(echo /wheel/*.whl)" \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin edgellm \
    && install --directory --owner edgellm --mode 0700 /data
# models, compiled kernels and settings
ENV EDGELLM_HOME=/data
VOLUME /data
WORKDIR /data
USER 10001
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["edgellm"]
CMD ["serve", "smollm2", "--host", "0.0.0.0"]
