# PostgreSQL as the official image behaves, as far as compose.yaml knows it, for machines that reach no image registry:
#   docker build --file tests/postgres.Dockerfile --tag postgres-test tests
#   make image-test POSTGRES_IMAGE=postgres-test
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends postgresql \
 && rm -rf /var/lib/apt/lists/* /var/lib/postgresql/* \
 && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/ \
 && mkdir -p /var/lib/postgresql/data \
 && chown -R postgres:postgres /var/lib/postgresql /run/postgresql
COPY postgres.sh /usr/local/bin/postgres.sh
ENV PGDATA=/var/lib/postgresql/data
VOLUME /var/lib/postgresql/data
STOPSIGNAL SIGINT
# By its name: its number is the distribution's choice.
# hadolint ignore=DL3066
USER postgres
ENTRYPOINT ["postgres.sh"]
