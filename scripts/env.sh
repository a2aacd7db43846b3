# Sourced by the other scripts: defines PYTHON, an interpreter with this project installed.
#
#   SONICMOE_PYTHON=/path/python  use this one as it is (containers, modules, an environment of yours)
#   SONICMOE_VENV=/path           where the environment lives; .venv of the repository otherwise
#
# The environment is made on the first call, which needs only Python >= 3.11 and a package index.
# Later calls compare one checksum: editing the sources needs no new installation, editing
# pyproject.toml gets one.

REPOSITORY=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
EXTRAS=train,dev

sonicmoe_find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
  done
  echo "error: no Python >= 3.11 on PATH: install one, or set SONICMOE_PYTHON=/path/to/python" >&2
  return 1
}

sonicmoe_install() { # VENV STAMP
  local system log=$1/install.log
  system=$(sonicmoe_find_python) || return 1
  echo "making the environment $1 with $("$system" --version): a few minutes, once" >&2
  # --without-pip: Debian's python3 has venv but not ensurepip; the outer pip installs into it
  if ! { "$system" -m venv "$1" || "$system" -m venv --without-pip "$1"; } >/dev/null 2>&1; then
    echo "error: '$system -m venv $1' failed: install the venv module (Debian: python3-venv)" >&2
    return 1
  fi
  local pip=("$1/bin/python" -m pip)
  "${pip[@]}" --version >/dev/null 2>&1 || pip=("$system" -m pip --python "$1/bin/python")
  if ! "${pip[@]}" install --disable-pip-version-check -e "$REPOSITORY[$EXTRAS]" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    echo "error: the installation failed; its whole log: $log" >&2
    return 1
  fi
  echo "$2" >"$1/sonicmoe-stamp"
}

sonicmoe_environment() {
  if [ -n "${SONICMOE_PYTHON:-}" ]; then
    PYTHON=$SONICMOE_PYTHON
    return
  fi
  local venv=${SONICMOE_VENV:-$REPOSITORY/.venv} stamp
  stamp="$EXTRAS $REPOSITORY $(cksum <"$REPOSITORY/pyproject.toml")"
  PYTHON=$venv/bin/python
  [ "$(cat "$venv/sonicmoe-stamp" 2>/dev/null)" = "$stamp" ] && return
  mkdir -p "$venv" || return 1
  # one installer at a time, also when every node of a job sources this at the same moment
  (
    if command -v flock >/dev/null; then flock 9; fi
    [ "$(cat "$venv/sonicmoe-stamp" 2>/dev/null)" = "$stamp" ] || sonicmoe_install "$venv" "$stamp"
  ) 9>"$venv/install.lock"
}

sonicmoe_environment || exit 1

# CPU threads that wait for each other sleep: spinning ones made a step 20 times slower on two cores
# that had other work as well.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
