#!/usr/bin/env bash
# 断网执行一条命令：.github/no-network.sh make test。只剩环回；组（docker）与提权（sudo）也放下，拿不回网络。
set -euo pipefail
if [[ ${1-} != --inside ]]; then
  sudo=()
  if [[ $EUID != 0 ]]; then
    # sudo 会清掉这两个变量，setup-python 的 Python 要它们
    sudo=(sudo -n -E env "PATH=$PATH" ${LD_LIBRARY_PATH:+"LD_LIBRARY_PATH=$LD_LIBRARY_PATH"})
  fi
  exec "${sudo[@]}" unshare --net "$0" --inside "$(id -u)" "$(id -g)" "$@"
fi
ip link set lo up
if [[ -n $(ip route; ip -6 route show default) ]]; then
  echo "$0: 还连得到网络，不执行。" >&2
  exit 1
fi
exec setpriv --reuid "$2" --regid "$3" --clear-groups --no-new-privs \
  --inh-caps=-all --bounding-set=-all -- "${@:4}"
