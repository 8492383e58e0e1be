#!/bin/sh
# Double-click in the Finder. The first start sets Slipstream up and takes some minutes.
cd "$(dirname "$0")/../.." || exit 1
for python in python3.13 python3.12 python3.11 python3.10 python3; do
    if command -v "$python" >/dev/null 2>&1; then
        "$python" launch.py "$@" && exit 0
        printf '\nPress Return to close this window. '
        read -r _
        exit 1
    fi
done
echo "Slipstream needs Python 3.10 to 3.13 from https://www.python.org/downloads/"
printf 'Press Return to close this window. '
read -r _
