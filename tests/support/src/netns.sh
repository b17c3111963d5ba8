# Removes a network namespace and its link when the process that made them is no more.
#
# $1 is the namespace, $2 the link's end outside. Standard input is a pipe from that process; its end is the signal.

trap '' HUP INT QUIT TERM
cat >/dev/null
# Both ends of the link go with the one.
ip link del "$2"
ip netns del "$1"
