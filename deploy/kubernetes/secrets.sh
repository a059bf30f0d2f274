#!/usr/bin/env bash
# usage: secrets.sh [NAMESPACE]
# Makes the Secrets of the daemon and of its agents, once: keys (CURVE), tokens, and a certificate for HTTPS, unless there
# is one (cert-manager's has the same names: tls.crt, tls.key, ca.crt). Needs sosa, openssl and kubectl.
set -euo pipefail
umask 077
namespace=${1:-sosa}
service=sosa-daemon

folder=$(mktemp --directory)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

secret() { # NAME KEY=FILE...
    local name=$1
    shift
    kubectl --namespace "$namespace" create secret generic "$name" "${@/#/--from-file=}"
}
has() { kubectl --namespace "$namespace" get secret "$1" >/dev/null 2>&1; }

kubectl get namespace "$namespace" >/dev/null 2>&1 || kubectl create namespace "$namespace"

if ! has sosa-daemon-keys; then
    sosa keys new keys >/dev/null
    secret sosa-daemon-keys daemon.key_secret=keys/daemon.key_secret agent.key=keys/clients/agent.key
    secret sosa-agent-keys daemon.key=keys/daemon.key agent.key_secret=keys/agent.key_secret
fi
if ! has sosa-tokens; then
    echo "people $(openssl rand -hex 32)" >http_tokens
    echo "alertmanager $(openssl rand -hex 32)" >webhook_tokens
    secret sosa-tokens http_tokens=http_tokens webhook_tokens=webhook_tokens
fi
if ! has sosa-tls; then
    # Its own authority: who trusts ca.crt trusts this one certificate.
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 825 -keyout tls.key -out tls.crt \
        -subj "/CN=$service" -addext "subjectAltName=DNS:$service,DNS:$service.$namespace.svc,DNS:localhost" 2>/dev/null
    secret sosa-tls tls.crt=tls.crt tls.key=tls.key ca.crt=tls.crt
fi
