#compdef vmforkctl
# SPDX-License-Identifier: Apache-2.0
# zsh completion for vmforkctl(1)

_vmforkctl_actions() {
  local -a actions
  actions=(${(f)"$(_call_program actions vmforkctl actions --no-legend 2>/dev/null | cut -d' ' -f1)"})
  _describe -t actions action actions
}

_vmforkctl() {
  local curcontext=$curcontext state line
  local -a verbs common
  verbs=(
    'status:generation, sources and the last fork'
    'list:the forks so far, newest last'
    'doctor:can this guest notice a fork, and what would help'
    'sources:edges and truths, live or not'
    'hooks:hooks with their origin and whether they run'
    'plan:what would run at the next fork, in order'
    'actions:the repairs that the shipped hooks call'
    'action:run one repair'
    'react:run the hooks for the newest fork'
    'rotate:give this guest a new identity'
    'trigger:act as if this guest was forked'
    'prepare:tell everybody that a snapshot is about to be taken'
    'resume:undo prepare'
    'wait:wait for a fork'
    'cat-config:every setting and where it comes from'
    'reload:read the configuration again'
  )
  common=(
    '--root[work on the guest in this directory]:directory:_directories'
    '--json=-[print JSON]:form:(pretty short off)'
    '-j[print JSON]'
    '--no-pager[do not use a pager]'
    '--no-legend[no headers and footers]'
    '(-q --quiet)'{-q,--quiet}'[print less]'
    '--version[print the version]'
    '(-h --help)'{-h,--help}'[print help]'
  )
  _arguments -C $common '1: :->verb' '*:: :->rest' && return

  case $state in
    verb) _describe -t verbs verb verbs ;;
    rest)
      case $words[1] in
        action) _arguments $common '--dry-run[change nothing]' '1:action:_vmforkctl_actions' ;;
        list) _arguments $common '(-n --lines)'{-n,--lines}'[only the newest]:number:' ;;
        plan) _arguments $common '--identity=-[whether to make a new identity]:policy:(auto rotate keep)' ;;
        react) _arguments $common '--dry-run[change nothing]' '--parent[end with this process]:process:_pids' ;;
        rotate|resume) _arguments $common '--dry-run[change nothing]' ;;
        trigger)
          _arguments $common '--dry-run[change nothing]' '--reason[why]:reason:' \
            '--identity=-[whether to make a new identity]:policy:(auto rotate keep)'
          ;;
        prepare)
          _arguments $common '--dry-run[change nothing]' '--template[every clone needs its own identity]' \
            '--deadline[undo it by itself]:seconds:'
          ;;
        wait)
          _arguments $common '--settled[until the reaction has succeeded]' \
            '--after[for a fork after this generation]:generation:' '--timeout[give up]:seconds:'
          ;;
        *) _arguments $common ;;
      esac
      ;;
  esac
}

_vmforkctl "$@"
