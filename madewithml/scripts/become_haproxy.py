# Ray starts this in place of HAProxy: it asks the supervisor what to run, and becomes that.
#
# Arguments: the supervisor's socket, the descriptor for the listening socket, the path of HAProxy's
# binary, and the arguments that Ray gives to HAProxy. Runs with `python -I -S`: standard library only.
import json
import os
import socket
import sys

control_socket, descriptor, binary, *arguments = sys.argv[1:]
os.setsid()  # a signal to the process group of Ray's manager must not reach HAProxy
with socket.socket(socket.AF_UNIX) as supervisor:
    supervisor.connect(control_socket)
    supervisor.sendall(json.dumps([os.getpid(), arguments]).encode())
    supervisor.shutdown(socket.SHUT_WR)
    reply, received, _, _ = socket.recv_fds(supervisor, 1 << 20, 1)
for listening_socket in received:
    os.dup2(listening_socket, int(descriptor), inheritable=True)
os.execv(binary, [binary, *json.loads(reply)])  # noqa: S606
