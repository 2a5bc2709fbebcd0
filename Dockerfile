# The deployable workers and Flower, as compose.yaml runs them.
FROM python:3.13.7-slim-bookworm

ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /srv/docket

# Before the code: a change of code leaves this layer as it is.
COPY requirements/image.txt requirements/image.txt
RUN pip install --require-hashes -r requirements/image.txt

COPY pyproject.toml README.md LICENSE ./
COPY docket_celery docket_celery
RUN pip install --no-deps --no-build-isolation .
COPY examples examples
COPY workers workers

RUN useradd --system --no-create-home docket
USER docket

CMD ["celery", "-A", "workers", "worker", "--events", "--loglevel", "INFO"]
