#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# vmforkd in the foreground on a fake guest: a plain directory with a kernel log, a bound driver and a generation ID.
# Needs no root and changes nothing outside the directory, which is removed at the end.
set -eu
cd "$(dirname "$0")/.."

root=$(mktemp -d "${TMPDIR:-/tmp}/vmfork-run.XXXXXX")
trap 'rm -rf "$root"' EXIT
trap ':' INT  # ^C ends the daemon; this script then tidies up

blob=sys/firmware/qemu_fw_cfg/by_name/etc/vmgenid_guid
mkdir -p "$root"/{dev,run/vmfork,etc/vmfork/hooks.d,usr/lib/vmfork,var/lib,proc/sys/kernel/random,"$blob"} \
    "$root/sys/bus/platform/drivers/vmgenid/QEMUVGID:00"
mkdir -m 0700 "$root/run/vmforkd" "$root/var/lib/vmfork"
mkfifo -m 0600 "$root/dev/kmsg"
cp /proc/sys/kernel/random/boot_id "$root/proc/sys/kernel/random/boot_id"
{ head -c 40 /dev/zero; head -c 16 /dev/urandom; head -c 4040 /dev/zero; } >"$root/$blob/raw"
cat >"$root/etc/vmfork/hooks.d/50-hello" <<'END'
#!/bin/sh
echo "hello from generation $VMFORK_GENERATION ($1)"
END
chmod 0755 "$root/etc/vmfork/hooks.d/50-hello"
# A fork as the guest sees it: the hypervisor's blob changes, then the kernel's line appears in its log.
cat >"$root/fork" <<END
#!/bin/bash
set -eu
{ head -c 40 /dev/zero; head -c 16 /dev/urandom; head -c 4040 /dev/zero; } >"$root/$blob/new"
mv "$root/$blob/new" "$root/$blob/raw"
read -r up _ </proc/uptime
printf '5,%d,%s,-;random: crng reseeded due to virtual machine fork\n' "\$(date +%s)" "\${up/./}0000" >"$root/dev/kmsg"
END
chmod 0755 "$root/fork"

cat <<END
The fake guest is $root. In another terminal:
  $root/fork                                      # fork it
  .venv/bin/vmforkctl --root $root status         # ask the daemon
  .venv/bin/vmforkctl --root $root doctor
^C ends it and removes the directory.

END
.venv/bin/python -m vmfork.daemon --root "$root"
