#!/usr/bin/env bash
# Installs the wheels beside it into the environment of `python3`, without a network. A package that is there
# in a version that suits stays as it is.
#
#     bash install.sh [--venv FOLDER]        --venv: into a new environment, which sees what python3 sees
set -euo pipefail

pack=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
export PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

fail() { # WHAT
    printf 'install: %s\n' "$1" >&2
    exit 2
}

if (($# > 0)); then [[ $1 == --venv && $# == 2 ]] || fail "unexpected word $1; there is --venv FOLDER"; fi
venv=${2:-}
wanted=$(<"$pack/python_version")
found=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "no python3 on the path"
[[ $found == "$wanted" ]] || fail "this pack is for Python $wanted, python3 here is $found; pack with --python $found"
python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip; install it (Debian: python3-pip)"
pip=(python3 -m pip)
if [[ -n $venv ]]; then
    [[ ! -e $venv ]] || fail "--venv $venv exists; name a new folder"
    python3 -m venv --without-pip "$venv" || fail "python3 cannot make environments (Debian: python3-venv)"
    # Not --system-site-packages, which passes over python3's own packages where it is itself an environment's.
    python3 -c 'import sys
for path in sys.path:
    if path.endswith("-packages"):
        print(f"import site; site.addsitedir({path!r})")' \
        >"$("$venv/bin/python3" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/around.pth"
    pip+=(--python "$venv/bin/python3")
fi
options=(install --quiet --no-index --find-links "$pack/wheels")
said=$("${pip[@]}" "${options[@]}" ffcv "$pack"/wheels/vitds-*.whl 2>&1) || {
    printf '%s\n' "$said" >&2
    lacking=$(sed -n 's/.*No matching distribution found for \([^ ;]*\).*/\1/p' <<<"$said" | head -n 1)
    [[ $said != *externally-managed-environment* ]] ||
        fail "this python3 is the system's, which pip leaves alone; add --venv FOLDER"
    [[ -z $lacking ]] || fail "$lacking is neither here nor in the pack; pack again with a --there FILE that says so"
    fail "pip could not install the pack; it said why above"
}
# A pack made anew has the same version, which pip would leave.
"${pip[@]}" "${options[@]}" --no-deps --force-reinstall "$pack"/wheels/vitds-*.whl
printf 'Installed. Next: %svitds doctor\n' "${venv:+source $venv/bin/activate && }"
