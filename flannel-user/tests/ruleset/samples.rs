//! Rules, and what a class does not hold of them.

/// Rules of iptables and their reason.
pub(crate) const IPTABLES: &[(&str, &str)] = &[
    ("-p tcp --sport 1000 -j DROP", "source port"),
    (
        "-p tcp -m multiport --sports 1000,1001 -j DROP",
        "source port",
    ),
    (
        "-p tcp -m multiport --ports 1000,1001 -j DROP",
        "source port",
    ),
    (
        "-p tcp -m conntrack --ctorigsrcport 1000 -j DROP",
        "source port",
    ),
    (
        "-p tcp -m connlimit --connlimit-above 3 -j REJECT",
        "connlimit",
    ),
    (
        "-m hashlimit --hashlimit-above 5/sec --hashlimit-name h -j DROP",
        "hashlimit",
    ),
    ("-m limit --limit 5/sec -j ACCEPT", "limit"),
    ("-m quota --quota 1000 -j ACCEPT", "quota"),
    (
        "-m statistic --mode random --probability 0.5 -j DROP",
        "statistic",
    ),
    (
        "-m statistic --mode nth --every 3 --packet 0 -j DROP",
        "statistic",
    ),
    ("-m recent --name r --set", "recent"),
    ("-j NFQUEUE --queue-num 0", "NFQUEUE"),
    ("-j NFLOG --nflog-group 3", "NFLOG"),
    ("-j LOG", "LOG"),
    ("-m time --timestart 01:00:00 -j DROP", "time"),
    ("-m u32 --u32 0&0xff=1 -j DROP", "u32"),
    ("-m string --string abc --algo bm -j DROP", "string"),
    ("-m length --length 100:200 -j DROP", "length"),
    ("-m ttl --ttl-lt 3 -j DROP", "ttl"),
    (
        "-m connbytes --connbytes 10 --connbytes-dir both --connbytes-mode bytes -j DROP",
        "connbytes",
    ),
    ("-m mac --mac-source 02:00:00:00:00:01 -j DROP", "mac"),
    ("-p tcp -m tcpmss --mss 1:100 -j DROP", "tcpmss"),
    ("-p tcp --tcp-option 8 -j DROP", "TCP option"),
    (
        "-m conntrack --ctexpire 10 -j DROP",
        "age of the connection",
    ),
    ("-m cpu --cpu 0 -j DROP", "cpu"),
    (
        "-m limit --limit 5/sec -m addrtype --dst-type LOCAL -j ACCEPT",
        "limit",
    ),
];

/// Rules of iptables that are none of a class's business.
pub(crate) const HARMLESS: &[&str] = &[
    "FORWARD -p tcp --dport 80 -j DROP",
    "FORWARD -s 10.244.1.2 -d 10.244.2.3 -p tcp -m multiport --dports 80,443 -j ACCEPT",
    "FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "FORWARD -m conntrack --ctstate INVALID -m limit --limit 5/min -j LOG",
    "FORWARD -p tcp ! --syn -m conntrack --ctstate NEW -j DROP",
    "FORWARD -i lo -m mark --mark 0x4000/0x4000 -m comment --comment limit -j ACCEPT",
    "FORWARD -p udp --sport 53 -j ACCEPT",
    "FORWARD -p icmp -m limit --limit 5/sec -j ACCEPT",
    "FORWARD -d 10.96.0.1 -m limit --limit 5/sec -j ACCEPT",
    "FORWARD ! -s 10.244.0.0/16 -m limit --limit 5/sec -j ACCEPT",
    "FORWARD -m iprange --dst-range 10.96.0.1-10.96.0.9 -m comment --comment x -j ACCEPT",
    "FORWARD -m addrtype --dst-type LOCAL -m limit --limit 5/sec -j ACCEPT",
    "FORWARD -p tcp --tcp-flags SYN,RST SYN -j REJECT",
    "FORWARD -m dscp --dscp 10 -j DROP",
    "INPUT -p tcp -m limit --limit 5/sec -j ACCEPT",
    "OUTPUT -p tcp --sport 22 -j ACCEPT",
];

/// Rules of nftables and their reason.
pub(crate) const NFTABLES: &[(&str, &str)] = &[
    ("tcp sport 1000 drop", "source port"),
    ("th sport { 1000, 1001 } drop", "source port"),
    (
        "ip saddr . tcp sport { 10.244.1.2 . 7 } drop",
        "source port",
    ),
    (
        "meta l4proto tcp ct original proto-src 1000 drop",
        "source port",
    ),
    ("ct count over 3 reject", "connlimit"),
    ("limit rate over 5/second drop", "limit"),
    ("quota over 1 mbytes drop", "quota"),
    ("numgen random mod 2 0 drop", "numgen"),
    ("numgen inc mod 2 0 drop", "numgen"),
    (
        "update @seen { ip saddr } accept",
        "set that packets change",
    ),
    ("ip saddr @seen drop", "set that packets change"),
    (
        "add @rates { ip saddr limit rate over 5/second } drop",
        "set that packets change",
    ),
    ("log group 3", "log"),
    ("log prefix \"new\"", "log"),
    ("meta hour >= 20:00 drop", "time"),
    ("meta time > \"2020-01-01 00:00:00\" drop", "time"),
    ("meta length > 100 drop", "length"),
    ("ip length > 100 drop", "length"),
    ("ip ttl < 3 drop", "TTL"),
    ("meta random & 1 == 0 drop", "random number"),
    ("symhash mod 2 0 drop", "hash over ports"),
    ("tcp option maxseg size < 500 drop", "TCP or IP option"),
    ("tcp sequence 1 drop", "field of the TCP header"),
    ("@ih,0,8 1 drop", "content of packets"),
    ("ct bytes > 1000 drop", "connbytes"),
    ("quota name allowance drop", "quota"),
    ("limit name pace accept", "limit"),
    (
        "ct helper set \"ftp-standard\"",
        "helper that reads connections",
    ),
    ("limit rate 5/second ip daddr 10.96.0.1 accept", "limit"),
    (
        "ip daddr 10.244.2.3 tcp dport 80 limit rate 5/second accept",
        "limit",
    ),
    ("ip daddr vmap { 10.244.2.3 : jump limited }", "limit"),
    ("ct state new jump limited", "limit"),
];

/// Rules of nftables that are none of a class's business.
pub(crate) const HARMLESS_NFTABLES: &[&str] = &[
    "tcp dport { 80, 443 } ip saddr 10.244.1.2 ip daddr 10.244.2.3 accept",
    "ip daddr @names drop",
    "ct state vmap { established : accept, related : accept, invalid : drop }",
    "ct state invalid limit rate 5/minute log",
    "tcp flags syn / fin,syn,rst,ack ct state new accept",
    "ip dscp af11 counter accept",
    "meta mark 0x4000 meta mark set meta mark ^ 0x4000",
    "ct mark set meta mark",
    "iifname \"cni0\" oifname \"flannel.1\" accept",
    "tcp flags syn tcp option maxseg size set rt mtu",
    "udp sport 53 accept",
    "meta l4proto icmp limit rate 5/second accept",
    "ip daddr 10.96.0.0/16 limit rate 5/second accept",
    "ip daddr 10.96.0.1-10.96.0.9 limit rate 5/second accept",
    "ip saddr != 10.0.0.0/8 limit rate 5/second accept",
    "fib daddr type local jump limited",
    "ip daddr . tcp dport vmap { 10.96.0.1 . 80 : jump limited }",
    "ip daddr . meta l4proto . th dport vmap { 10.244.2.3 . udp . 53 : jump limited }",
    "meta nfproto ipv6 limit rate 5/second accept",
    "ip6 daddr fd00::1 tcp sport 7 accept",
    "counter name passed accept",
    "jhash ip saddr mod 2 0 accept",
];
