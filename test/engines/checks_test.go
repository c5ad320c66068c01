package engines

// useSystemd waits until systemd runs in the container of that name, uses it, and stops it.
const useSystemd = `
docker exec systemd sh -c 'until s=$(systemctl is-system-running --wait 2>/dev/null); [ "$s" = running ] || [ "$s" = degraded ]; do sleep 0.5; done; echo $s; systemctl --failed --no-legend'
docker exec systemd systemctl is-active dbus.service systemd-journald.service systemd-logind.service
docker exec systemd sh -c 'systemd-run --quiet --wait --pipe grep -o "/system.slice/run-.*" /proc/self/cgroup | sed "s/run-u[0-9]*/run/" | sort -u'
docker stop -t 100 systemd
field systemd '{{.State.Status}} {{.State.ExitCode}}'
docker rm systemd
`

// checks are all that the engines are asked to do, in the order of the documents. Names of containers are
// unique in an engine. What a check leaves is removed by its own last lines.
var checks = []check{
	{
		name: "run", short: "docker",
		about: "run with --rm, -i, -d, --name; output, errors, exit status; programs that cannot be run; ps; rm -f",
		script: `
docker run --rm busybox sh -c 'echo to stdout; echo to stderr >&2; exit 3'
echo typed | docker run --rm -i busybox cat
docker run --rm busybox nosuch
docker run --rm busybox /etc
docker run -d --name run busybox sh -c 'echo $((6*7)); exec sleep 1000'
await says 42 docker logs run
docker ps --filter name=run --format '{{.Names}} {{.Image}} {{.Command}}'
docker run -d --name run busybox true
docker rm run
docker rm -f run
docker ps -aq --filter name=run
`,
	},
	{
		name: "docker-runtime", only: "docker",
		about: "run --runtime, by name",
		script: `
docker run --rm --runtime $RUNTIME busybox echo by the runtime that the option names
`,
	},
	{
		name: "podman-runtime", only: "podman",
		about: "podman --runtime, by path",
		script: `
podman --runtime $RUNTIME run --rm busybox echo by the runtime that the option names
`,
	},
	{
		name: "terminal", short: "docker",
		about: "run -it and exec -it on a terminal: its size, input, exit status; attach",
		script: `
terminal "docker run -it --rm busybox sh -c 'tty; until stty size 2>/dev/null | grep 93; do sleep 0.1; done; echo ready; read x; echo \$x; exit 7'" ready hello
docker run -dit --name terminal busybox sh -c 'until read -t 1 x; do echo tick; done; echo got $x; exit 6'
terminal "docker exec -it terminal sh -c 'tty; until stty size 2>/dev/null | grep 93; do sleep 0.1; done; echo \$TERM; echo ready; read x; echo \$x; exit 8'" ready hello
terminal 'docker attach terminal' tick '' tick hello | grep -v tick
docker wait terminal
await is exited terminal '{{.State.Status}}'
docker rm terminal
`,
	},
	{
		name: "detach", only: "docker",
		about: "detaching from a terminal by keys; the container runs on",
		script: `
docker run -dit --name detach busybox sh -c 'while :; do echo tick; sleep 1; done'
terminal 'docker attach detach' tick '' tick "$(printf '\020\021')" | grep -o 'read escape sequence'
field detach '{{.State.Status}}'
docker rm -f detach
`,
	},
	{
		name: "process", short: "docker",
		about: "--user, --group-add, --env, --env-file, --workdir, --entrypoint, --hostname, --add-host, --label, --ulimit, --init, --stop-signal, --oom-score-adj",
		script: `
printf 'B=of the file\n' >env
docker run --rm --user 1000:2000 --group-add 7 --env A=1 --env-file env --workdir /tmp/new --entrypoint sh --hostname web --add-host other:10.0.0.1 --ulimit nofile=100:200 --ulimit core=0 busybox -c \
 'id; echo $A $B $PATH; pwd; hostname; grep other /etc/hosts; ulimit -n; ulimit -Hn; ulimit -c; cat /proc/self/oom_score_adj'
docker run --rm --user user busybox sh -c 'id; echo $HOME'
docker run -d --name process --init --label a=b --stop-signal USR1 busybox sh -c 'trap "echo usr1; exit 5" USR1; echo set; while :; do sleep 0.1; done'
await says set docker logs process
docker exec process sh -c 'cat /proc/1/comm'
docker inspect --format '{{index .Config.Labels "a"}}' process
docker stop -t 20 process
docker logs process
field process '{{.State.ExitCode}}'
docker rm process
docker run --rm --oom-score-adj 500 busybox cat /proc/self/oom_score_adj
`,
	},
	{
		name:  "security",
		about: "--cap-add, --cap-drop, --security-opt no-new-privileges and seccomp=FILE, the default profile, masked paths, --privileged",
		script: `
echo '{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":28}]}' >profile.json
docker run --rm --cap-drop ALL --cap-add CHOWN --security-opt no-new-privileges --security-opt seccomp=profile.json busybox sh -c \
 'grep -E "Cap|NoNew|Seccomp:" /proc/self/status; mkdir /x; chown 1 /tmp && echo chown; chroot / true'
docker run --rm busybox sh -c 'grep -E "Cap|NoNew|Seccomp:" /proc/self/status; unshare -m true; mount -t tmpfs x /tmp; wc -c </proc/timer_list; echo x >/proc/sys/kernel/panic'
docker run --rm --privileged busybox sh -c 'mount -t tmpfs x /tmp && echo mounted'
`,
	},
	{
		name: "mounts", short: "docker",
		about: "-v and --mount of a directory, a single file, read-only, named volumes (filled from the image), --tmpfs, --read-only, --shm-size; changes seen on both sides",
		script: `
mkdir dir && echo one >dir/file && echo two >single
docker run -d --name mounts -v $PWD/dir:/dir -v $PWD/single:/etc/single -v $PWD/dir:/ro:ro -v vol:/var/volume --mount type=bind,src=$PWD/dir,dst=/bound,readonly --tmpfs /scratch:size=1m,mode=1770 --read-only --shm-size 2m busybox sleep 1000
docker exec mounts sh -c 'cat /dir/file /etc/single; echo three >/dir/made; touch /ro/x /bound/x /x; ls -a /var/volume; echo more >/var/volume/more; df -k /scratch | tail -n 1; stat -c %a /scratch; touch /dev/shm/x'
cat dir/made
echo changed >dir/file; await says changed docker exec mounts cat /dir/file; docker exec mounts cat /ro/file
echo in the guest | docker exec -i mounts sh -c 'cat >/etc/single'; cat single
docker inspect --format '{{range .Mounts}}{{.Type}} {{.Destination}} {{.RW}}{{println}}{{end}}' mounts | sort
docker rm -f mounts
docker run --rm -v vol:/v busybox ls /v
docker volume rm vol
docker run --rm -v /var/anonymous busybox sh -c 'echo x >/var/anonymous/y && ls /var/anonymous'
`,
	},
	{
		name:  "kernel",
		about: "--sysctl, --device, --uts host, --ipc host, --pid host",
		script: `
docker run --rm --sysctl kernel.msgmax=4096 --sysctl net.ipv4.ip_default_ttl=33 --device /dev/null:/dev/other:r busybox sh -c 'cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_default_ttl; ls -l /dev/other | awk "{print \$1, \$5, \$6}"; echo x >/dev/other'
docker run --rm --device /dev/nosuch busybox true
docker run --rm --pid host busybox true
docker run --rm --ipc host busybox true
docker run --rm --uts host busybox true
`,
	},
	{
		name: "limits", short: "docker",
		about: "--memory with OOM: exit status and OOMKilled; --pids-limit, --cpus; update",
		script: `
docker run --name oom --memory 32m --memory-swap 32m busybox sh -c 'dd if=/dev/zero of=/dev/null bs=100M count=1; exit $?'
field oom '{{.State.ExitCode}} {{.State.OOMKilled}}'
docker rm oom
docker run -d --name limits --memory 32m --memory-swap 32m --cpus 0.5 --pids-limit 20 busybox sleep 1000
docker exec limits dd if=/dev/zero of=/dev/null bs=60M count=1
docker exec limits sh -c 'for i in $(seq 30); do sleep 1 & done; wait' 2>&1 | grep -o "can't fork.*"
docker update --memory 100m --memory-swap 100m --cpus 1 --pids-limit 50 limits
field limits '{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}}'
docker exec limits dd if=/dev/zero of=/dev/null bs=60M count=1 2>&1 | grep records
docker stats --no-stream --format '{{.MemUsage}}' limits | grep -o '/.*'
docker rm -f limits
`,
	},
	{
		name: "groups", short: "docker",
		about: "--group-add: what a user makes by a supplementary group, in a volume and in the image's own root: owner, group, mode",
		script: `
mkdir shared && chgrp 1001 shared && chmod 2775 shared
docker run --rm -u 1002:1003 --group-add 1001 -v $PWD/shared:/g busybox sh -c 'umask 002; touch /g/file; mkdir /g/dir /g/dir/below; ln -s file /g/link; mkfifo /g/fifo; ln /g/file /g/hard; stat -c "%n %u:%g %a" /g/* /g/dir/*'
docker run --rm -u 1002:1003 --group-add 1001 -v $PWD/shared:/g busybox sh -c 'touch /g/own; chgrp 1003 /g/own && chgrp 1001 /g/own && echo changed group; chmod 2755 /g/own; mv /g/file /g/dir/moved; rm /g/hard; chgrp 7 /g/own; stat -c "%n %u:%g %a" /g/own'
stat -c '%n %u:%g %a' shared/* shared/dir/*
docker run --rm -u 1002:1003 -v $PWD/shared:/g busybox touch /g/denied
docker run --rm -u 1004:1003 --group-add 1001 -v $PWD/shared:/g busybox sh -c 'touch /g/dir/other && rm /g/own; echo x >>/g/dir/moved; chmod 700 /g/dir/moved'
docker run -d --name groups -u 1002:1003 --group-add 1001 busybox sh -c 'until [ -e /srv/ready ]; do sleep 0.1; done; touch /srv/file; mkdir /srv/dir; stat -c "%n %u:%g %a" /srv/*'
docker exec -u 0 groups sh -c 'mkdir /srv; chgrp 1001 /srv; chmod 2775 /srv; touch /srv/ready'
docker wait groups
docker logs groups
docker rm groups
`,
	},
	{
		name: "acls", short: "docker",
		about: "POSIX ACLs of files in a volume: what they deny and allow, what is inherited of a default ACL, ACLs that are set in the container",
		script: `
mkdir acl acl/dir && echo secret | tee acl/denied acl/allowed acl/group >/dev/null && chmod 644 acl/denied acl/group && chmod 600 acl/allowed
setfacl -m u:1000:--- acl/denied; setfacl -m u:1000:r acl/allowed; setfacl -m g:2000:---,o::--- acl/group; setfacl -d -m u:1000:rwx,g::r,o::- acl/dir
docker run --rm -u 1000 -v $PWD/acl:/v busybox cat /v/denied
docker run --rm -u 1000 -v $PWD/acl:/v busybox cat /v/allowed
docker run --rm -u 1001:2000 -v $PWD/acl:/v busybox sh -c 'cat /v/denied /v/allowed /v/group'
docker run --rm -v $PWD/acl:/v busybox sh -c 'umask 027; touch /v/dir/file; mkdir /v/dir/sub; getfacl -cn /v/denied /v/dir/file /v/dir/sub 2>/dev/null; setfacl -m u:1000:rw /v/denied; setfacl -b /v/group; getfacl -cn /v/denied'
getfacl -cn acl/dir/file acl/dir/sub acl/denied acl/group
docker run --rm -u 1000 -v $PWD/acl:/v busybox sh -c 'cat /v/denied; touch /v/dir/mine && echo made; echo x >/v/dir/file && echo written'
`,
	},
	{
		name: "locks", short: "docker",
		about: "flock of one file in a volume by two containers and by the host: held, waited for, given up at the holder's end",
		script: `
mkdir locks
docker run -d --name locks -v $PWD/locks:/v busybox sh -c 'exec 9>/v/lock; flock 9; echo held; exec sleep 1000'
await says held docker logs locks
docker run --rm -v $PWD/locks:/v busybox flock -n /v/lock echo taken
docker run --rm -v $PWD/locks:/v busybox flock -n -s /v/lock echo taken shared
flock -n locks/lock echo taken on the host
docker run -d --name waits -v $PWD/locks:/v busybox sh -c 'echo waits; flock /v/lock echo taken after'
await says waits docker logs waits
docker kill locks
docker wait waits
docker logs waits
flock locks/lock sh -c 'docker run --rm -v $PWD/locks:/v busybox flock -n /v/lock echo taken; exit $?'
docker run --rm -v $PWD/locks:/v busybox flock -n /v/lock echo taken
docker rm locks waits
`,
	},
	{
		name: "sqlite", short: "docker",
		about: "two containers write to one sqlite database in a volume, with a rollback journal: no error, no row lost",
		script: `
mkdir sql
docker run --rm -v $PWD/sql:/v busybox sqlite3 /v/db 'create table t(who, n); pragma journal_mode'
printf '%s\n' 'until [ -e /v/go ]; do sleep 0.05; done' 'for i in $(seq 100); do echo "insert into t values($1, $i);"; done | sqlite3 -cmd ".timeout 100000" /v/db' >sql/writer
docker run -d --name sql1 -v $PWD/sql:/v busybox sh /v/writer 1
docker run -d --name sql2 -v $PWD/sql:/v busybox sh /v/writer 2
touch sql/go
docker wait sql1 sql2
docker logs sql1; docker logs sql2
docker run --rm -v $PWD/sql:/v busybox sqlite3 /v/db 'select who, count(*), count(distinct n) from t group by who order by who; pragma integrity_check'
sqlite3 sql/db 'select count(*) from t'
docker rm sql1 sql2
`,
	},
	{
		name: "oom", short: "docker",
		about: "programs that want more memory than the container, or than its VM, has: killed with 137 and OOMKilled; memory that is asked for and not used",
		script: `
docker run --name killed --memory 64m --memory-swap 64m busybox dd if=/dev/zero of=/dev/null bs=300M count=1
field killed '{{.State.ExitCode}} {{.State.OOMKilled}}'
docker rm killed
docker run --rm --memory 256m --memory-swap 256m busybox sh -c 'dd if=/dev/null of=/dev/null bs=600M count=1 2>&1 | head -n 1'
docker run --rm --memory 64m --memory-swap 64m busybox sh -c 'dd if=/dev/zero of=/dev/null bs=300M count=1; echo $?'
`,
	},
	{
		name:  "many-files",
		about: "a volume with 25,000 files that the container has all looked at: it can still be entered, and new ones be made",
		script: `
mkdir many && cd many && for d in $(seq 50); do mkdir $d && (cd $d && seq 500 | xargs touch); done
docker run -d --name many -v $PWD/many:/v busybox sleep 1000
docker exec many sh -c 'ls -lR /v | grep -c ^-'
docker exec many sh -c 'find /v -type f | wc -l; echo one >/v/1/new; cat /v/1/new'
docker exec many echo entered
cat many/1/new
docker rm -f many
`,
	},
	{
		name:  "reload",
		about: "a watch (inotify) on a small read-only volume: it sees the swap of ..data, by which Kubernetes changes a config map",
		script: `
mkdir -p map/..v1 map/..v2 && echo one >map/..v1/conf && echo two >map/..v2/conf && ln -s ..v1 map/..data && ln -s ..data/conf map/conf
docker run -d --name reload -v $PWD/map:/map:ro busybox sh -c 'cat /map/conf; inotifywait -m -e moved_to --format "%e %f" /map'
await says 'Watches established' docker logs reload
ln -s ..v2 map/..tmp && mv -T map/..tmp map/..data
await says MOVED_TO docker logs reload
docker exec reload cat /map/conf
docker logs reload 2>/dev/null
docker rm -f reload
`,
	},
	{
		name: "exec", short: "docker podman",
		about: "exec with -i, -d, -u, -e, -w, --privileged; exit status; programs that are missing; in containers that are stopped or paused",
		script: `
docker run -d --name exec --env A=container --workdir /tmp busybox sleep 1000
docker exec exec sh -c 'echo $A; pwd; id -u; exit 9'
echo typed | docker exec -i -u 1000:7 -e A=exec -w /etc exec sh -c 'cat; echo $A; pwd; id'
docker exec -d exec sh -c 'echo detached >/tmp/detached'
await docker exec exec test -s /tmp/detached
docker exec exec cat /tmp/detached
docker exec exec nosuch
docker exec exec /etc/passwd
docker exec -w /nosuch exec true
docker exec -u nosuch exec true
docker exec exec sh -c 'kill -9 $$'
docker exec --privileged exec grep CapEff /proc/self/status
seq 1 100000 | docker exec -i exec cat | cksum
docker exec exec sh -c 'seq 1 200000; seq 1 1000 >&2' 2>/dev/null | cksum
docker stop -t 0 exec
docker exec exec true
docker rm exec
`,
	},
	{
		name: "logs", short: "docker",
		about: "logs, -f, --tail, --timestamps, of both streams; attach with standard input; --log-driver none",
		script: `
docker run -di --name logs busybox sh -c 'echo one; echo two >&2; read x; echo got $x; echo end'
await says two docker logs logs
docker logs logs 2>/dev/null
docker logs logs 2>&1 >/dev/null
docker logs --tail 2 logs 2>&1 | sort
docker logs --timestamps logs 2>/dev/null
docker stop -t 0 logs
echo typed | docker start -ai logs
docker wait logs
docker logs -f logs 2>/dev/null
docker rm logs
docker run -d --name nolog --log-driver none busybox echo x
docker wait nolog
docker logs nolog
docker rm nolog
`,
	},
	{
		name: "signals", short: "docker",
		about: "stop with a grace period and SIGKILL after it, kill -s, wait, exit status, pause and unpause, restart, rename, start of a stopped container",
		script: `
docker run -d --name signals busybox sh -c 'trap "echo term; exit 4" TERM; trap "echo hup" HUP; echo set; while :; do sleep 0.1; done'
await says set docker logs signals
docker kill -s HUP signals
await says hup docker logs signals
docker pause signals
field signals '{{.State.Status}}'
docker exec signals true
docker unpause signals
field signals '{{.State.Status}}'
docker rename signals renamed
docker stop -t 30 renamed
field renamed '{{.State.Status}} {{.State.ExitCode}} {{.State.Pid}}'
docker start renamed
await is running renamed '{{.State.Status}}'
await sh -c 'docker logs renamed | grep -c set | grep -q 2'
docker restart -t 30 renamed
await sh -c 'docker logs renamed | grep -c set | grep -q 3'
docker logs renamed
docker kill renamed
docker wait renamed
docker kill renamed
docker rm renamed
docker run -d --name stubborn busybox sleep 1000
docker stop -t 1 stubborn
field stubborn '{{.State.ExitCode}} {{.State.OOMKilled}}'
docker rm stubborn
`,
	},
	{
		name: "looking", short: "docker podman",
		about: "stats, top, inspect (the pid lives on the host), events, diff, export",
		script: `
docker run -d --name looking busybox sleep 1000
docker stats --no-stream --format '{{.Name}} {{.PIDs}}' looking | grep -c '^looking [1-9]'
docker top looking | wc -l
docker top looking | grep -o 'sleep 1000'
kill -0 $(field looking '{{.State.Pid}}')
field looking '{{.State.Status}} {{.State.Running}} {{.State.ExitCode}}'
docker exec looking sh -c 'echo x >/new; rm /usr/share/doc/README'
docker diff looking | sort
docker export looking | tar -t | grep -c bin/busybox
docker kill looking
docker rm looking
docker events --since 5m --until $(($(date +%s)+1)) --filter container=looking --format '{{.Status}}' | grep -vE '^(cleanup|sync|init|mount|unmount|remove|exec_died.*)$' | sed 's/:.*//'
`,
	},
	{
		name: "copies", short: "docker podman",
		about: "cp both ways, from and to containers that run and that do not; commit, and the image that it makes",
		script: `
mkdir -p tree/sub && echo deep >tree/sub/file && chmod 640 tree/sub/file
docker create --name copies busybox sleep 1000
docker cp tree copies:/tmp/
docker start copies
docker exec copies sh -c 'cat /tmp/tree/sub/file; stat -c %a /tmp/tree/sub/file; echo made inside >/tmp/made'
docker cp copies:/tmp/made made && cat made
echo while it runs >late && docker cp late copies:/root/late
docker exec copies cat /root/late
docker cp copies:/nosuch x
docker stop -t 0 copies
docker cp copies:/tmp/made - | tar -xO
docker commit -c 'CMD ["cat","/tmp/made"]' copies committed
docker rm copies
docker run --rm committed
docker rmi committed
`,
	},
	{
		name:  "restart",
		about: "--restart=on-failure:2, --restart=always after a kill of the program from inside",
		script: `
docker run -d --name failing --restart on-failure:2 busybox sh -c 'echo run; exit 3'
await is '2 exited' failing '{{.RestartCount}} {{.State.Status}}'
docker logs failing
field failing '{{.State.ExitCode}}'
docker rm failing
docker run -d --name always --restart always busybox sh -c 'echo run; sleep 2; exit 1'
await sh -c 'docker logs always | grep -c run | grep -q 2'
docker rm -f always
`,
	},
	{
		name: "health", short: "docker",
		about: "health checks: healthy, then unhealthy",
		only:  "docker",
		script: `
docker run -d --name health --health-cmd 'test -e /tmp/well' --health-interval 0.3s --health-retries 2 busybox sh -c 'touch /tmp/well; exec sleep 1000'
await is healthy health '{{.State.Health.Status}}'
docker exec health rm /tmp/well
await is unhealthy health '{{.State.Health.Status}}'
docker ps --filter name=health --format '{{.Status}}'
docker rm -f health
`,
	},
	{
		name: "podman-health", short: "podman",
		about: "healthcheck run: healthy and unhealthy",
		only:  "podman",
		script: `
podman run -d --name health --health-cmd 'test -e /tmp/well' --health-interval disable busybox sh -c 'touch /tmp/well; exec sleep 1000'
await podman healthcheck run health
podman healthcheck run health; echo $?
podman exec health rm /tmp/well
podman healthcheck run health; echo $?
podman rm -f -t 0 health
`,
	},
	{
		name:  "network",
		about: "a container's address, route and names; published ports; two containers talking; --network none and host",
		script: `
docker run -d --name server -p 8080:80 -p 5353:53/udp --hostname server busybox sh -c 'mkdir /www; echo served >/www/index.html; (while :; do echo answer | nc -u -l -p 53 -w 1; done) & exec httpd -f -p 80 -h /www'
fetch http://127.0.0.1:8080/
address=$(field server '{{.NetworkSettings.IPAddress}}'); fetch http://$address/
docker port server | grep -v ::: | sort
docker exec server sh -c 'ip -4 -o addr show dev eth0 | wc -l; ip route | wc -l; cat /sys/class/net/eth0/mtu; grep -c server /etc/hosts; grep -c nameserver /etc/resolv.conf'
[ "$(docker exec server cat /sys/class/net/eth0/address)" = $(field server '{{.NetworkSettings.MacAddress}}') ] && echo same MAC address
[ "$(docker exec server ip -4 -o addr show dev eth0 | awk '{print $4}' | cut -d/ -f1)" = $(field server '{{.NetworkSettings.IPAddress}}') ] && echo same address
docker run --rm busybox timeout 20 wget -q -O - http://$(field server '{{.NetworkSettings.IPAddress}}')/
docker run --rm busybox ping -c 3 -q -W 5 $(field server '{{.NetworkSettings.IPAddress}}') | grep packets
docker stats --no-stream --format '{{.NetIO}}' server | grep -c B
docker rm -f server
docker run --rm --network none busybox sh -c 'ip -o link | wc -l'
docker run --rm --network host busybox true
docker run --rm --mac-address 02:42:0a:00:00:99 busybox cat /sys/class/net/eth0/address
docker run --rm --dns 10.0.0.1 --dns-search example.org busybox cat /etc/resolv.conf
`,
	},
	{
		name: "networks", short: "docker podman",
		about: "networks of one's own: names and aliases resolve, connect and disconnect while the container runs, --ip, the engine's name server over UDP",
		script: `
docker network create --subnet 10.212.1.0/24 net1 | grep -c .
docker network create --subnet 10.212.2.0/24 net2 | grep -c .
docker run -d --name alpha --network net1 --network-alias other --ip 10.212.1.77 busybox sh -c 'mkdir /www; echo alpha >/www/index.html; exec httpd -f -p 80 -h /www'
docker run -d --name beta --network net1 busybox sleep 1000
await docker exec beta timeout 20 wget -q -O - http://alpha/
docker exec beta timeout 20 wget -q -O - http://alpha/
docker exec beta timeout 20 wget -q -O - http://other/
docker exec beta nslookup alpha | grep -o '10.212.1.77'
docker exec beta sh -c 'ping -c 1 -W 5 alpha | grep -o "1 packets received"'
docker exec beta nslookup nosuch.invalid >/dev/null; echo $?
docker run -d --name gamma --network net2 busybox sleep 1000
docker exec gamma ping -c 1 -W 1 10.212.1.77 | grep -o '. packets received'
docker network connect net1 gamma
await docker exec gamma test -e /sys/class/net/eth1
await docker exec gamma ping -c 1 -W 1 alpha
docker exec gamma sh -c 'ls /sys/class/net; ip -4 -o addr | wc -l'
docker exec gamma timeout 20 wget -q -O - http://alpha/
docker network disconnect net1 gamma
await sh -c '! docker exec gamma test -e /sys/class/net/eth1'
docker exec gamma ping -c 1 -W 1 10.212.1.77 | grep -o '. packets received'
docker rm -f alpha >/dev/null; docker rm -f beta >/dev/null; docker rm -f gamma
docker network rm net1; docker network rm net2
`,
	},
	{
		name: "sharing", short: "docker",
		about: "--network container:X, --pid container:X, --ipc container:X",
		script: `
docker run -d --name shared --ipc shareable busybox sh -c 'echo web >/tmp/index.html; exec httpd -f -p 80 -h /tmp'
docker run --rm --network container:shared busybox timeout 20 wget -q -O - http://127.0.0.1/
docker run --rm --pid container:shared busybox sh -c 'cat /proc/1/comm; ps | grep -q httpd && echo seen'
docker run --rm --ipc container:shared busybox sh -c 'echo in shm >/dev/shm/file'
docker exec shared cat /dev/shm/file
docker run --rm --network container:nosuch busybox true
docker exec shared true
docker rm -f shared
`,
	},
	{
		name: "compose", short: "docker", only: "docker",
		about: "docker-compose with two services: names, a volume, dependencies, up, exec, logs, down",
		script: `
mkdir site && echo composed >site/index.html
printf 'version: "2.4"\nservices:\n  web:\n    image: busybox\n    command: httpd -f -p 80 -h /site\n    volumes: ["./site:/site:ro"]\n    ports: ["8081:80"]\n    stop_grace_period: 0s\n  client:\n    image: busybox\n    depends_on: [web]\n    command: sh -c "until timeout 20 wget -q -O - http://web/; do sleep 0.2; done; sleep 1000"\n    stop_grace_period: 0s\n' >docker-compose.yml
docker-compose -p compose up -d 2>/dev/null
await says composed docker-compose -p compose logs client
docker-compose -p compose logs --no-color client 2>/dev/null | grep -o composed
fetch http://127.0.0.1:8081/
docker-compose -p compose exec -T web cat /site/index.html
docker-compose -p compose ps -q | wc -l
docker-compose -p compose down 2>/dev/null
docker ps -aq --filter name=compose; docker network ls -q --filter name=compose
`,
	},
	{
		name: "pods", short: "podman", only: "podman",
		about: "pods: create with a published port, three containers that share localhost, hostname and ipc; one kernel for all; ps, stop, start, rm",
		script: `
podman pod create --name pod -p 8090:80 --hostname podhost
podman run -d --pod pod --name pod-web busybox sh -c 'mkdir /www; echo in a pod >/www/index.html; exec httpd -f -p 80 -h /www'
podman run -d --pod pod --name pod-client busybox sleep 1000
podman run --rm --pod pod busybox timeout 20 wget -q -O - http://127.0.0.1/
fetch http://127.0.0.1:8090/
podman exec pod-client sh -c 'hostname; echo shm >/dev/shm/x'; podman exec pod-web sh -c 'hostname; cat /dev/shm/x'
[ "$(podman exec pod-web cat /proc/sys/kernel/random/boot_id)" = "$(podman exec pod-client cat /proc/sys/kernel/random/boot_id)" ] && echo one kernel
podman pod ps --filter 'name=^pod$' --format '{{.Name}} {{.Status}} {{.NumberOfContainers}}'
podman pod stop -t 1 pod
podman pod ps --filter 'name=^pod$' --format '{{.Name}} {{.Status}}'
podman pod start pod
podman run --rm --pod pod busybox sh -c 'until timeout 20 wget -q -O - http://127.0.0.1/; do sleep 0.2; done'
podman pod rm -f -t 0 pod
`,
	},
	{
		name: "kube", short: "podman", only: "podman",
		about: "generate kube and play kube with a local image",
		script: `
podman pod create --name kube
podman create --pod kube --name kube-web busybox httpd -f -p 80 -h /etc
podman generate kube kube >kube.yaml
podman pod rm -f -t 0 kube
grep -c 'image:' kube.yaml
podman play kube kube.yaml | grep -ciE 'pod|container'
podman run --rm --pod kube busybox sh -c 'until timeout 20 wget -q -O - http://127.0.0.1/hostname; do sleep 0.2; done'
podman play kube --down kube.yaml | grep -ciE 'pods'
podman pod rm -f -t 0 kube 2>/dev/null
`,
	},
	{
		name: "systemd", short: "docker", only: "docker", image: true, limit: systemdTimeout,
		about: "Debian's systemd as PID 1, by the usual recipe for a host with cgroup v1: it gets to `running`, makes groups for its services, and stops by itself",
		script: `
docker run -d --name systemd --tmpfs /run --tmpfs /run/lock -v /sys/fs/cgroup:/sys/fs/cgroup:ro --stop-signal SIGRTMIN+3 systemd
` + useSystemd,
	},
	{
		name: "podman-systemd", short: "podman", only: "podman", image: true, limit: systemdTimeout,
		about: "Debian's systemd as PID 1, for which Podman has a mode: it gets to `running`, makes groups for its services, and stops by itself",
		script: `
podman run -d --name systemd systemd
` + useSystemd,
	},
	{
		name: "systemd-privileged", short: "docker", harms: true, image: true, limit: systemdTimeout,
		about: "systemd with --privileged gets to `running`, and stops by itself. Only runv gets this: with runc it changes the host's sysctls and cgroups",
		script: `
quiet docker run -d --name privileged --privileged --stop-signal SIGRTMIN+3 systemd
says running docker exec privileged sh -c 'until s=$(systemctl is-system-running --wait 2>/dev/null); [ "$s" = running ] || [ "$s" = degraded ]; do sleep 0.5; done; echo $s; systemctl --failed --no-legend'
quiet docker exec privileged ls /proc/sys/fs/binfmt_misc/status
quiet docker exec privileged systemd-run --quiet --wait --pipe grep -q /system.slice/run- /proc/self/cgroup
quiet docker stop -t 100 privileged
is exited privileged '{{.State.Status}}'
quiet docker rm privileged
`,
	},
	{
		name: "crash", short: "docker", alone: true,
		about: "dockerd killed and started again while containers run (live-restore): they run on, and are waited for, logged, entered, stopped",
		only:  "docker",
		script: `
docker run -d --name crash busybox sh -c 'i=0; while :; do i=$((i+1)); echo line $i; sleep 0.2; done'
docker run -d --name crash-ends busybox sh -c 'while [ ! -e /tmp/end ]; do sleep 0.1; done; exit 6'
await says 'line 2' docker logs crash
kill-and-restart-dockerd
docker ps --format '{{.Names}}' --filter name=crash | sort
docker exec crash echo entered
docker exec crash-ends touch /tmp/end
docker wait crash-ends
docker logs crash | head -n 3
n=$(docker logs crash | wc -l); await sh -c "[ \$(docker logs crash | wc -l) -gt $n ]"
docker stop -t 0 crash
field crash '{{.State.ExitCode}}'
docker rm crash crash-ends
`,
	},
}
