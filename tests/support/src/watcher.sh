# Cleans up after a process that is no more: ends the program it had started, and removes its folder.
#
# $1 is the folder. Standard input is a pipe from that process, which nobody else holds; it says what there is to end:
#     main ID        the program, leader of a process group (no ID: none is running)
#     frozen ID...   processes that were stopped with SIGSTOP (no ID: none)
#     nothing        the folder belongs to somebody else
# The end of the file means that the process has closed the pipe, has left, or was killed.

folder=$1
main=
frozen=

# Whoever ends the tests with Ctrl-C, or by closing the terminal, still wants this work to be done.
trap '' HUP INT QUIT TERM

while read -r what ids; do
    case $what in
        main) main=$ids ;;
        frozen) frozen=$ids ;;
        nothing) folder= ;;
    esac
done

pause() {
    sleep 0.02 2>/dev/null || sleep 1
}

# A zombie counts as gone: its parent may be too busy to collect it.
is_alive() {
    kill -0 "$1" 2>/dev/null || return 1
    [ -r "/proc/$1/stat" ] || return 0
    read -r _ _ state _ 2>/dev/null <"/proc/$1/stat" && [ "$state" != Z ]
}

children_of() {
    if [ -r /proc/self/stat ]; then
        for entry in /proc/[0-9]*; do
            read -r _ _ _ parent _ 2>/dev/null <"$entry/stat" && [ "$parent" = "$1" ] && echo "${entry#/proc/}"
        done
    else
        ps -axo pid=,ppid= | while read -r child parent; do [ "$parent" = "$1" ] && echo "$child"; done
    fi
}

if [ -n "$frozen" ]; then
    # shellcheck disable=SC2086 # several ids
    kill -s CONT $frozen 2>/dev/null
fi

# `kill -s NAME -- -ID` is the one form that all shells know for a group.
if [ -n "$main" ]; then
    # A stopped process acts on no signal but SIGKILL, so all are woken before the end is announced.
    for id in $(children_of "$main") "$main"; do kill -s CONT "$id" 2>/dev/null; done
    kill -s QUIT -- "-$main" 2>/dev/null
    tries=500
    while is_alive "$main" && [ "$tries" -gt 0 ]; do
        tries=$((tries - 1))
        pause
    done
    if is_alive "$main"; then
        for id in $(children_of "$main"); do kill -s KILL "$id" 2>/dev/null; done
        kill -s KILL -- "-$main" 2>/dev/null
    fi
fi

[ -n "$folder" ] || exit
# A server that was killed has left a little of System V's shared memory, of which the system has room for some thousand. The seventh line of
# its file has the key and the number.
if [ -r "$folder/data/postmaster.pid" ]; then
    sed -n 7p "$folder/data/postmaster.pid" 2>/dev/null | {
        read -r _ segment && ipcrm -m "$segment" 2>/dev/null
    }
fi
# The last processes may be writing still, so one attempt may find a folder not empty.
tries=250
while rm -rf -- "$folder" 2>/dev/null; [ -e "$folder" ] && [ "$tries" -gt 0 ]; do
    tries=$((tries - 1))
    pause
done
