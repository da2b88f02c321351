# Sourced by launch/quickstart.sh and tests/run.sh: makes .venv in the project's root and installs
# the project there, once. `install_project [EXTRA]` installs again only when setup.cfg changed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
# The extras that tests need.
tested=test,slurm,privacy,lm,captions

install_project() {
    local target=$root${1:+"[$1]"} stamp
    if [ ! -x "$venv/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$venv" || {
            echo "error: could not make $venv; Debian and Ubuntu need: apt install python3-venv" >&2
            return 2
        }
    fi
    if [ -z "${1:-}" ]; then
        for stamp in "$venv"/.installed*; do # with an extra, the rest was installed too
            if cmp -s "$root/setup.cfg" "$stamp"; then return; fi
        done
    fi
    stamp=$venv/.installed${1:+-$1}
    if ! cmp -s "$root/setup.cfg" "$stamp"; then
        echo "installing into $venv (about a minute and 5 GB the first time)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$target" || {
            local free_mb=$(($(df -Pk "$venv" | awk 'NR == 2 {print $4}') / 1024))
            echo "error: the installation failed; $venv has $free_mb MB free now," \
                "and a first one takes about 8000 while it runs; free some, and run this again" >&2
            return 2
        }
        cp "$root/setup.cfg" "$stamp"
    fi
}
