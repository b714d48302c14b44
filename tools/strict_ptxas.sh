#!/bin/sh
# Runs a compile command and fails it where ptxas reports a "Potential Performance Loss": that it ignores setmaxnreg or
# serializes WGMMA. ptxas counts these as information, so that -Werror=all-warnings lets them pass.
output=$("$@" 2>&1)
status=$?
[ -z "$output" ] || printf '%s\n' "$output"
case $output in
*"Potential Performance Loss"*) exit 1 ;;
esac
exit $status
