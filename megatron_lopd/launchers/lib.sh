# shellcheck shell=bash disable=SC2154  # stage, directory, ... are set by the script that sources this
# What every job of the launcher does. One script has two parts: the batch shell (`job`), once, and a
# task on each node (`task`), which srun starts inside the container, if there is one.

RESEND_SECONDS=5 # a rank that is still importing torch has no handler yet: it is asked again
CLOCK_SECONDS=30 # how far a node's clock may be from the file system's

# One line of text, whatever is in it: names are the user's, and a log is read on a terminal.
say() {
    local text="$*"
    printf 'lopd launcher: %s\n' "${text//[[:cntrl:]]/?}"
}

main() {
    if [ "${1:-}" = task ]; then task; else job; fi
}

# The batch shell: run the step, pass on the wish to stop, and see what is to be done about its end.
job() {
    local attempt=${SLURM_RESTART_COUNT:-0} id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    local asked="" fresh step code
    log=$directory/logs/$stage-$id-attempt$attempt.log
    # New, and then put in its place: opened there, it would be whatever a link that is there leads to.
    fresh=$(mktemp "$directory/logs/.XXXXXXXX") && chmod "$(printf '%o' $((0666 & ~$(umask))))" "$fresh" || exit 1
    exec >> "$fresh" 2>&1
    mv --force --no-target-directory "$fresh" "$log" || exit 1
    export LOPD_EXIT_FILE=$directory/logs/$stage-$id-attempt$attempt.exit
    rm -f "$LOPD_EXIT_FILE"
    say "$stage, job $id, attempt $attempt, on $SLURM_JOB_NODELIST, $(date --iso-8601=seconds)"
    trap 'asked=yes' USR1 TERM
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        --kill-on-bad-exit=1 --unbuffered "${srun_options[@]}" bash "$directory/$stage.sbatch" task &
    step=$!
    while kill -0 "$step" 2> /dev/null; do
        if [ -n "$asked" ]; then
            kill -USR1 "$step" 2> /dev/null # srun passes it to every process of the step
            sleep "$RESEND_SECONDS"
        else
            wait "$step" # ends early when a trapped signal comes
        fi
    done
    wait "$step"
    code=$?
    finish "$code" "$attempt" "$id"
}

# One task on each node. torchrun ends its ranks when it gets a signal: it must not see USR1. What it starts
# inherits that, until the ranks set their own handlers.
task() {
    cd "$work_dir" || exit 2
    setup
    check_node
    if [ "$ranks" -eq 0 ]; then
        exec python -m megatron_lopd.cli "${arguments[@]}"
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK > ranks ? SLURM_CPUS_PER_TASK / ranks : 1))} # else torchrun's 1
    trap '' USR1
    # Jobs that share a node differ, and so do attempts: one that finds its port taken is queued again.
    local port=$((20000 + (SLURM_JOB_ID + 997 * ${SLURM_RESTART_COUNT:-0}) % 10000))
    exec python -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node="$ranks" \
        --node-rank="$SLURM_NODEID" --master-addr="$(first_host)" --master-port="$port" \
        -m megatron_lopd.cli "${arguments[@]}"
}

# Of `node[03-05,07]` or `node03,node04`, the first; a container may have no scontrol to ask.
first_host() {
    local list=$SLURM_STEP_NODELIST
    [[ $list =~ ^([^][,]*)(\[([^],-]*))? ]] && echo "${BASH_REMATCH[1]}${BASH_REMATCH[3]}"
}

check_node() {
    local probe off
    if ! probe=$(mktemp "$directory/.clock-$SLURM_JOB_ID-$SLURM_NODEID-XXXXXXXX"); then
        say "$(hostname) cannot write $directory: mount it there (container.mounts, in a container)"
        exit 2
    fi
    off=$(($(date +%s) - $(stat --format=%Y "$probe")))
    rm -f "$probe"
    if [ "${off#-}" -gt "$CLOCK_SECONDS" ]; then # workers do not compare clocks; people do
        say "the clock of $(hostname) is $off s off the file system's: its logs are dated wrongly"
    fi
}

# finish CODE ATTEMPT ID: done, failed, or to be queued again. lopd notes its exit code in LOPD_EXIT_FILE, as
# torchrun makes every code 1; a process that noted none was killed, or crashed.
finish() {
    local code=$1 attempt=$2 id=$3 noted failed reason
    noted=$(cat "$LOPD_EXIT_FILE" 2> /dev/null)
    failed=$(grep --invert-match --extended-regexp '^75 |EngineDied' <<< "$noted" | grep --max-count=1 .)
    if [ "$code" -eq 2 ]; then failed=${failed:-2}; fi # a usage error, or a check of `check_node`
    if [ "$code" -eq 0 ] || { [ -z "$failed" ] && [[ $noted == *RefreshDue* ]]; }; then
        say "$stage is done"
        exit 0
    fi
    if [ -n "$failed" ]; then
        give_up "$stage failed with exit code ${failed%% *}" "${failed%% *}"
    fi
    reason="was killed or crashed (exit code $code)"
    if [[ $noted == *StopRequested* ]]; then reason="stopped as asked"; fi
    # By its name as a task: the last of an array has the array's own SLURM_JOB_ID, which means all of them.
    if [ "$(squeue --noheader --jobs="$id" --format=%T)" != RUNNING ]; then
        say "$stage $reason: SLURM is ending this job or queueing it again by itself"
        exit "$code"
    fi
    if [ "$attempt" -ge "$max_requeues" ]; then
        give_up "$stage $reason after max_requeues=$max_requeues" 1
    fi
    say "$stage $reason: queued again, $((attempt + 1)) of at most $max_requeues times"
    scontrol requeue "$id" || give_up "job $id cannot be queued again" 1
    exit 0
}

# give_up WHAT CODE
give_up() {
    say "$1: read $log, mend it, scancel the jobs held behind this one, and submit again"
    exit "$2"
}
