#!/usr/bin/env bash
# Makes .venv in the project root and installs vitds there, in editable mode, with all it needs. Needs no root
# and touches no system package (only a missing compiler or Python is installed, and only when run as root);
# writes nothing outside the project.
#
#     bash launch/setup_env.sh                    VITDS_PYTHON=/path/to/python chooses the interpreter
#
# When nothing changed, a call returns at once. The project's folder may be moved with its .venv.
# `rm -rf .venv` starts afresh.
set -euo pipefail
export LC_ALL=C PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0 PYTHONNOUSERSITE=1
unset PYTHONHOME PYTHONPATH

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root" # before any pattern of files is read
venv=$root/.venv
native=$venv/native # OpenCV and libjpeg-turbo, for FFCV and for vitds/kernels/pixels.c
work=$venv/tmp      # emptied at the end
log=$venv/setup.log
space_needed_gb=10 # 6.5 stay; 3 of downloads come on top
sources=(setup.cfg setup.py pyproject.toml constraints.txt launch/setup_env.sh vitds/kernels/*.[ch])
stage_name=
exec 3>&1 4>&2 # the caller's, while a stage's output goes to the log

say() { printf '%s\n' "$*" >&3; }

fail() { # WHAT REMEDY
    printf 'set-up: %s\n        %s\n' "$1" "$2" >&4
    stage_name=
    exit 1
}

# ---- what the system must have -----------------------------------------------------------------------------

version_of() { # PYTHON: its version, as 3.11; nothing where it does not run
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

choose_python() { # sets python and version; both empty where there is none
    local candidates=("$venv/bin/python" python3 python3.13 python3.12 python3.11 python3.10) candidate
    [[ -z ${VITDS_PYTHON:-} ]] || candidates=("$VITDS_PYTHON")
    for candidate in "${candidates[@]}"; do
        version=$(version_of "$candidate")
        if [[ $version =~ ^3\.1[0-3]$ ]]; then
            # of an environment's python the one behind it: the environment may be this one, and be made anew
            # below
            python=$("$candidate" -c 'import sys; print(sys._base_executable)')
            return
        fi
    done
    [[ -z ${VITDS_PYTHON:-} ]] ||
        fail "VITDS_PYTHON=$VITDS_PYTHON is Python ${version:-? (it does not run)}; \
vitds runs on 3.10 to 3.13." \
            "Name another interpreter, or leave VITDS_PYTHON unset and the script looks for one."
    python='' version=''
}

missing_packages() { # the Debian names of what is not there, one a line
    if [[ -z $python ]]; then
        printf '%s\n' python3 python3-venv
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "python$version-venv"
    fi
    command -v "$CC" >/dev/null || echo gcc
    command -v "$CXX" >/dev/null || echo g++
}

require_tools() {
    # Named, because a Python asks for the compiler that it was itself built with, which need not be there.
    export CC=${CC:-gcc} CXX=${CXX:-g++}
    choose_python
    local missing
    mapfile -t missing < <(missing_packages)
    ((${#missing[@]} > 0)) || return 0
    if ! command -v apt-get >/dev/null; then
        local conda="conda create -n vitds -c conda-forge python=3.11 compilers opencv libjpeg-turbo"
        fail "this system lacks ${missing[*]} (Debian's names; vitds needs Python 3.10 to 3.13, C and C++)." \
            "With conda: $conda && conda activate vitds"
    elif ((EUID != 0)); then
        fail "this system lacks ${missing[*]}." "Install with: sudo apt-get install ${missing[*]}"
    fi
    say "  installing ${missing[*]}, which this system lacks"
    {
        apt-get update &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
    } >/dev/null ||
        fail "apt-get could not install ${missing[*]}; it said why above." \
            "Install them by hand, then call this script again."
    choose_python
    [[ -n $python ]] || fail "this system's python3 is not 3.10 to 3.13." \
        "Install one that is and name it: VITDS_PYTHON=/path/to/python"
}

require_space() {
    local free_gb
    free_gb=$(df -Pk "$root" | awk 'NR == 2 {print int($4 / 1024 / 1024)}')
    ((free_gb >= space_needed_gb)) ||
        fail "$root has $free_gb GB of free disk; the environment needs $space_needed_gb GB." \
            "Free some, or move the project to a larger disk."
}

# ---- the stages --------------------------------------------------------------------------------------------

make_venv() { "$python" -m venv "$@" "$venv"; }

pip() { "$venv/bin/python" -m pip --no-cache-dir "$@"; }

# OpenCV's development package pulls in some hundred others; FFCV needs two of its modules. apt resolves names
# and needs, which differ between distributions, but in folders of ours: lists, cache, and a record of
# installed packages that names only what stays the system's.
unpack_from_apt() {
    local name names unpacked=$work/unpacked apt=(apt-get -c "$work/apt.conf")
    mkdir -p "$work"/{lists/partial,cache/archives/partial,debs} "$unpacked"
    for name in libc6 libc6-dev libgcc-s1 libstdc++6 libglx-mesa0; do
        printf '%s\n' "Package: $name" 'Status: install ok installed' 'Multi-Arch: same' 'Version: 999' \
            "Architecture: $(dpkg --print-architecture)" 'Maintainer: -' 'Description: -' ''
    done >"$work/status"
    cat >"$work/apt.conf" <<EOF
Dir::State "$work";
Dir::State::status "$work/status";
Dir::Cache "$work/cache";
Acquire::Languages "none";
Acquire::Retries "2";
APT::Sandbox::User "";
#clear APT::Update;
EOF
    "${apt[@]}" update || echo "apt-get update failed, perhaps in a source that is not needed here"
    names=$("${apt[@]}" --simulate --no-install-recommends install libopencv-imgproc-dev libturbojpeg0-dev |
        awk '$1 == "Inst" {print $2}')
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' ||
        names+=" libpython$version-dev"
    # shellcheck disable=SC2086  # a word a package
    (cd "$work/debs" && "${apt[@]}" download $names)
    for name in "$work"/debs/*.deb; do dpkg -x "$name" "$unpacked"; done
    find "$unpacked" -path '*/lib/*' \( -name '*.so.*' -o -name 'libopencv_*.so' -o -name libturbojpeg.so \) \
        -exec cp -P -t "$native/lib" {} +
    cp -r "$unpacked/usr/include/." "$native/include/"
}

# Without apt: the active conda environment, or what the system's own package tool brought.
link_from_prefix() {
    local prefix library
    for prefix in "${CONDA_PREFIX:-/usr}" /usr /usr/local; do
        if [[ -e $prefix/include/turbojpeg.h && -d $prefix/include/opencv4 ]]; then
            library=$(find "$prefix"/lib* -name libturbojpeg.so | head -n 1)
            ln -s "$prefix/include/turbojpeg.h" "$prefix/include/opencv4" "$native/include/"
            rmdir "$native/lib"
            ln -s "$(dirname "$library")" "$native/lib"
            return
        fi
    done
    echo "neither turbojpeg.h nor opencv4"
    return 1
}

make_native() {
    rm -rf "$native"
    mkdir -p "$native"/{bin,lib,include/opencv2}
    if command -v apt-get; then unpack_from_apt; else link_from_prefix; fi
    # FFCV includes all of OpenCV: every module that this header names
    printf '#define HAVE_OPENCV_%s\n' CORE IMGPROC >"$native/include/opencv2/opencv_modules.hpp"
    # FFCV's setup.py asks pkg-config and splits the answer at blanks; this one names no folder, they are in
    # CPATH and LIBRARY_PATH
    cat >"$native/bin/pkg-config" <<'EOF'
#!/bin/sh
case "$*" in *opencv*) echo -lopencv_core -lopencv_imgproc ;; *turbojpeg*) echo -lturbojpeg ;; esac
EOF
    chmod +x "$native/bin/pkg-config"
}

# The library looks for its needs, and they for theirs (--disable-new-dtags), relative to itself, so that the
# environment can be moved. Never from pip's cache: a wheel kept there was built against other libraries.
build_ffcv() {
    pip install -c constraints.txt pip setuptools
    CPATH=$native/include:$native/include/opencv4:$native/include/python$version${CPATH:+:$CPATH} \
        LIBRARY_PATH=$native/lib${LIBRARY_PATH:+:$LIBRARY_PATH} \
        LDFLAGS="${LDFLAGS:-} -Wl,--disable-new-dtags,-rpath,\$ORIGIN/../../../../native/lib" \
        PATH=$native/bin:$PATH \
        pip install --no-deps --no-build-isolation --no-binary ffcv --force-reinstall "$ffcv_wanted"
    echo "$ffcv_wanted" >"$native/complete"
}

# Compiling 13,000 modules is half of pip's time, on one core; so it is left to all cores. (Not to the first
# import: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every start would compile.) Some
# packages hold files that are not Python 3.
install_packages() {
    pip install --no-compile --no-build-isolation -c constraints.txt -e '.[test]'
    "$venv/bin/python" -m compileall -qq -j 0 "$venv"/lib/python3*/site-packages || true
}

# pip writes the folder's absolute name into the commands and into the link to the sources; both are made
# relative to themselves.
make_movable() {
    "$venv/bin/python" - "$venv" <<'EOF'
import re
import sys
from pathlib import Path

venv = Path(sys.argv[1])
python = rb"[^\n]*/\.venv/bin/python[\d.]*"
by_sh = rb"#!/bin/sh\n'''exec' " + python + rb'"? "\$0" "\$@"' + rb"\n' '''"
absolute = re.compile(rb"(#!" + python + rb"|" + by_sh + rb")\n")
relative = b"""#!/bin/sh\n'''exec' "$(dirname -- "$(readlink -f -- "$0")")/python" "$0" "$@"\n' '''\n"""
for command in (venv / "bin").iterdir():
    if command.is_file() and not command.is_symlink() and (found := absolute.match(command.read_bytes())):
        command.write_bytes(relative + command.read_bytes()[found.end() :])
for link in venv.glob("lib/python3*/site-packages/__editable__.vitds-*.pth"):
    link.write_text("../../../..\n")
EOF
}

load() { # LIBRARY...: each by its path without the ending that this Python gives to compiled parts
    "$venv/bin/python" - "$@" <<'EOF'
import ctypes
import sys
import sysconfig

for library in sys.argv[1:]:
    path = library.replace("PLATLIB", sysconfig.get_path("platlib"))
    ctypes.CDLL(path + sysconfig.get_config_var("EXT_SUFFIX"))
EOF
}

ffcv_loads() { load PLATLIB/ffcv/_libffcv 2>/dev/null; }

check_compiled() { load PLATLIB/ffcv/_libffcv "$root"/vitds/kernels/_{pixels,softmax,mix}; }

install_vitds() {
    install_packages
    make_movable
    check_compiled
}

# ---- running them ------------------------------------------------------------------------------------------

stage() { # TEXT COMMAND...: a line with the seconds that it took; the command's output goes to the log
    local started=$SECONDS
    stage_name=$1
    shift
    printf '  %-60s' "$stage_name" >&3
    printf '==== %s\n' "$stage_name" >>"$log"
    "$@" >>"$log" 2>&1
    printf '%4d s\n' $((SECONDS - started)) >&3
    stage_name=
}

explain_failure() { # when the script ends inside a stage
    local status=$? output
    [[ -n $stage_name ]] || return "$status"
    printf '\n' >&3
    ((status != 130 && status != 143)) || fail "interrupted." "The same command starts again."
    output=$(awk '/^==== / {text = ""} {text = text $0 "\n"} END {printf "%s", text}' "$log")
    tail -n 15 <<<"$output" >&4
    case $output in
    *"No space left"* | *"Disk quota exceeded"*)
        fail "the disk is full." \
            "The environment needs $space_needed_gb GB in $root. Free some, then call this script again." ;;
    *"Could not resolve"* | *"Temporary failure"* | *NameResolutionError* | *NewConnectionError* | \
        *"etwork is unreachable"* | *"Could not connect"* | *ConnectTimeout* | \
        *ReadTimeout* | *"Connection timed out"*)
        fail "no network: \"$stage_name\" could not reach the package servers." \
            "Check the connection (behind a proxy: http_proxy and https_proxy), then call this again." ;;
    *CERTIFICATE_VERIFY_FAILED*)
        fail "the package server's certificate is not trusted here, as behind a proxy with one of its own." \
            "Name the file of trusted certificates, PIP_CERT=/path/to/file.crt, and call this again." ;;
    *"neither turbojpeg.h nor opencv4"*)
        fail "no apt here, and no OpenCV and libjpeg-turbo with headers, which FFCV is compiled against." \
            "With conda: conda install -c conda-forge opencv libjpeg-turbo compilers; call this there." ;;
    *)
        fail "\"$stage_name\" failed; its last lines are above, all of them in $log." \
            "Once the cause is gone, call this script again."
        ;;
    esac
}

# Of what a set-up begins with, and of what it builds: one compiled part gone or cut short, and there is
# something to do.
fingerprint() {
    local built=("$venv"/lib/python3*/site-packages/ffcv/_libffcv*.so "$native"/lib/*.so*)
    built+=(vitds/kernels/_{pixels,softmax,mix}*.so)
    { echo "$root" && "$venv/bin/python" -V && sha256sum "${sources[@]}" "${built[@]}"; } 2>&1 | sha256sum
}

is_up_to_date() {
    [[ -f $venv/fingerprint && $(<"$venv/fingerprint") == "$(fingerprint)" ]] &&
        [[ -z ${VITDS_PYTHON:-} || $(version_of "$VITDS_PYTHON") == "$(version_of "$venv/bin/python")" ]]
}

open_venv() { # the one that is there, or a new one
    # pip cannot tell a half-installed package from a sound one: an environment whose first set-up did not end
    # is made anew
    if [[ -e $venv/unfinished || $(version_of "$venv/bin/python") != "$version" ]]; then
        rm -rf "$venv"
        require_space
        mkdir "$venv"
        touch "$venv/unfinished"
    fi
    rm -rf "$venv/fingerprint" "$work"
    mkdir "$work"
    export TMPDIR=$work # pip unpacks gigabytes there; /tmp is often a small memory disk
    date >"$log"
    if [[ -e $venv/bin/python ]]; then
        say "Bringing $venv up to date. Details: $log"
        stage "environment" make_venv --without-pip # renews what holds the folder's name
    else
        say "Setting up $venv with $python (Python $version), 3 GB to download. Details: $log"
        stage "environment" make_venv
    fi
}

main() {
    (($# == 0)) || fail "unexpected word $1." \
        "This script takes none. VITDS_PYTHON=/path/to/python chooses the interpreter."
    if ! is_up_to_date; then
        [[ -w . ]] || fail "$root cannot be written to, and its .venv is missing or not up to date." \
            "Make it writable, or copy the project."
        exec 9>.venv.lock
        flock -n 9 || { say "another set-up of $root is running; waiting for it" && flock 9; }
    fi
    if is_up_to_date; then # perhaps by that other set-up
        say "environment: $venv is up to date"
        return
    fi
    require_tools
    trap explain_failure EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    ffcv_wanted=$(grep '^ffcv==' constraints.txt)
    open_venv
    if [[ ! -e $native/complete || $(<"$native/complete") != "$ffcv_wanted" ]] || ! ffcv_loads; then
        stage "OpenCV's core and libjpeg-turbo, unpacked" make_native
        stage "FFCV, compiled" build_ffcv
    fi
    stage "PyTorch, DeepSpeed, timm and the others; vitds" install_vitds
    rm -rf "$work" "$venv/unfinished"
    fingerprint >"$venv/fingerprint"
    say "Ready after $SECONDS s. Next: source \"$venv/bin/activate\" && vitds doctor"
}

main "$@"
