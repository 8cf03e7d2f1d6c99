# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# bash completion for vmforkctl(1)

_vmforkctl() {
    local cur prev words cword
    if declare -F _init_completion >/dev/null; then
        _init_completion -n = || return
    else
        words=("${COMP_WORDS[@]}")
        cword=$COMP_CWORD
        cur=${words[cword]}
        prev=${words[cword - 1]}
    fi

    local verbs='status list doctor sources hooks plan actions action react rotate trigger prepare resume wait cat-config reload'
    local common='--root --json=pretty --json=short --json=off -j --no-pager --no-legend -q --quiet --version -h --help'
    local verb='' word position
    for ((position = 1; position < cword; position++)); do
        word=${words[position]}
        case $word in
            --root) ((position++)) ;;
            -*) ;;
            *) verb=$word; break ;;
        esac
    done

    case $prev in
        --root)
            mapfile -t COMPREPLY < <(compgen -d -- "$cur")
            compopt -o filenames 2>/dev/null
            return
            ;;
        --after | --timeout | --reason | --deadline | --lines | -n | --parent) return ;;
    esac

    local choices
    case $cur in
        --json=*) choices='--json=pretty --json=short --json=off' ;;
        --identity=*) choices='--identity=auto --identity=rotate --identity=keep' ;;
        -*)
            choices=$common
            case $verb in
                list) choices+=' -n --lines' ;;
                plan) choices+=' --identity=auto --identity=rotate --identity=keep' ;;
                action | rotate | resume) choices+=' --dry-run' ;;
                react) choices+=' --dry-run --parent' ;;
                trigger) choices+=' --dry-run --reason --identity=auto --identity=rotate --identity=keep' ;;
                prepare) choices+=' --dry-run --template --deadline' ;;
                wait) choices+=' --settled --after --timeout' ;;
            esac
            ;;
        *)
            case $verb in
                '') choices=$verbs ;;
                action) choices=$("${words[0]}" actions --no-legend 2>/dev/null | cut -d' ' -f1) ;;
                *) choices='' ;;
            esac
            ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$cur")
}

complete -F _vmforkctl vmforkctl
