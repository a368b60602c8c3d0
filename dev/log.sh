# Sourced by scripts in dev/: runs steps and prints how long each took.

# step NAME COMMAND [ARG ...]: the command's output is shown as it comes; the time when it is done.
step() {
	local name=$1 start=$EPOCHREALTIME status=0
	shift
	echo "==> $name"
	"$@" || status=$?
	if ((status != 0)); then
		echo "==> $name FAILED after $(seconds_since "$start") s (exit code $status)" >&2
		return "$status"
	fi
	echo "==> $name: $(seconds_since "$start") s"
}

seconds_since() {
	LC_ALL=C awk -v from="$1" -v to="$EPOCHREALTIME" 'BEGIN { printf "%.1f", to - from }'
}
