#!/bin/sh
# usage: secrets.sh FOLDER ALERTMANAGER_FOLDER
# Keys and tokens of a daemon, those of them that Alertmanager needs in a folder of their own. Makes what is missing, and
# changes nothing that is there.
set -eu
umask 077

token() { python -c 'import secrets; print(secrets.token_hex(32))'; }

[ -e "$1/keys/daemon.key" ] || sosa keys new "$1/keys"
[ -e "$1/http_tokens" ] || { echo "people $(token)" >"$1/http_tokens.new" && mv "$1/http_tokens.new" "$1/http_tokens"; }
if [ ! -e "$1/webhook_tokens" ] || [ ! -e "$2/sosa-token" ]; then
    alert=$(token)
    # Alertmanager is another user. No newline: it would be part of the token.
    (umask 022 && printf %s "$alert" >"$2/sosa-token")
    echo "alertmanager $alert" >"$1/webhook_tokens.new" && mv "$1/webhook_tokens.new" "$1/webhook_tokens"
fi
