#!/usr/bin/sh
# The guest's first process: mounts, modules, the scenario, the verdict, off.
# Not busybox's shell: that one prefers its own `ip`, `ping` and `modprobe` to the real ones.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
/usr/bin/busybox mkdir -p /busybox /proc /sys /dev /tmp /run /root /etc /var/run
/usr/bin/busybox --install -s /busybox
export PATH=$PATH:/busybox
ln -s /usr/bin/sh /bin/sh

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t bpf bpf /sys/fs/bpf
ip link set lo up

for module in $(cat /guest-modules); do
    modprobe -q "$module"
done

echo "guest kernel: $(uname -r), up after $(cut -d' ' -f1 /proc/uptime) s"
sh /guest-command </dev/null
echo "guest exit code: $?"
poweroff -f
