#!/bin/bash
# A small machine for a real LXD on this one: own processes, mounts, network, cgroups. Nothing of it
# outlives the process that started it, and nothing of the machine itself is changed.
#
# usage: namespace.sh DIR     prints the pid of the namespace's init, ends when its stdin does.
# DIR gets: data.img (a btrfs, mounted inside on DIR/stateful), cgroup (where its cgroups are).
# Inside: /run is a tmpfs, /etc/subuid suits the raw.idmap of the contract (docs/contract.md), lo is up, eth0 is a dummy.
set -euo pipefail

name_of_tests=termina-lxd

# The directory of our own cgroup in a hierarchy, as /proc/self/cgroup and mountinfo know it.
hierarchies() {
    local controllers path mount
    while IFS=: read -r _ controllers path; do
        if [[ -z $controllers ]]; then
            mount=$(findmnt -n -t cgroup2 -o TARGET | head -n 1)
        else
            mount=$(findmnt -n -t cgroup -O "${controllers%%,*}" -o TARGET | head -n 1 || true)
            [[ -n $mount ]] || mount=/sys/fs/cgroup/${controllers#name=}
        fi
        [[ -d $mount$path ]] && echo "$mount${path%/}"
    done </proc/self/cgroup
}

# Cgroups of runs whose init is gone: they were killed before they could clean up.
sweep() {
    local parent group pid
    while read -r parent; do
        for group in "$parent/$name_of_tests"-*; do
            pid=${group##*-}
            [[ -d $group && ! -d /proc/$pid ]] || continue
            find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
        done
    done < <(hierarchies)
}

outer() {
    local dir=$1 parent group
    sweep
    while read -r parent; do
        group=$parent/$name_of_tests-$$
        mkdir -p "$group"
        if [[ -e $group/cpuset.cpus && -e $group/cpuset.mems && ! -e $group/cgroup.controllers ]]; then
            cat "$parent/cpuset.cpus" >"$group/cpuset.cpus"
            cat "$parent/cpuset.mems" >"$group/cpuset.mems"
        fi
        echo "$group"
    done < <(hierarchies) >"$dir/cgroup"
    while read -r group; do
        echo $$ >"$group/cgroup.procs"
    done <"$dir/cgroup"
    # The pid stays the same through both execs: it is in the names of the cgroups.
    exec setpriv --pdeathsig KILL unshare --mount --net --pid --cgroup --fork --kill-child \
        --mount-proc "$(readlink -f "$0")" --inner "$dir"
}

inner() {
    local dir=$1 group controllers
    mount --make-rprivate /
    local -a wanted=()
    while IFS=: read -r _ controllers _; do
        [[ -z $controllers ]] || wanted+=("$controllers")
    done </proc/self/cgroup
    mount -t sysfs sysfs /sys
    if ((${#wanted[@]})); then
        mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
        for controllers in "${wanted[@]}"; do
            group=/sys/fs/cgroup/${controllers#name=}
            mkdir "$group"
            if [[ $controllers == name=* ]]; then
                mount -t cgroup -o "none,$controllers" cgroup "$group"
            else
                mount -t cgroup -o "$controllers" cgroup "$group"
            fi
        done
        mkdir /sys/fs/cgroup/unified
        mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
    else
        mount -t cgroup2 cgroup2 /sys/fs/cgroup
    fi
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir -p /run/lock
    for controllers in subuid subgid; do
        printf 'root:%s\n' 1000000:1000000000 1000:1 1001:1 655360:1 665357:1 >"/run/$controllers"
        mount --bind "/run/$controllers" "/etc/$controllers"
    done
    ip link set lo up
    : >/run/resolv.conf
    truncate -s 8G "$dir/data.img"
    mkfs.btrfs -q -f "$dir/data.img"
    mkdir -p "$dir/stateful"
    mount -o loop,user_subvol_rm_allowed "$dir/data.img" "$dir/stateful"
    # A /dev of its own, so that tests can add to it.
    mkdir /run/dev
    mount -t tmpfs -o mode=755 tmpfs /run/dev
    find /dev -mindepth 1 -maxdepth 1 ! -type d ! -type s -exec cp -a {} /run/dev/ \;
    cp -a /dev/net /run/dev/
    mkdir -m 1777 /run/dev/shm
    mkdir /run/dev/pts
    mount --rbind /dev/pts /run/dev/pts
    mount --move /run/dev /dev
    mount --make-rshared /
    # The init of the namespace: bash reaps what is left to it while it waits for its stdin to end.
    echo ready
    while read -r _; do :; done
}

if [[ ${1-} == --inner ]]; then
    inner "$2"
else
    outer "$1"
fi
