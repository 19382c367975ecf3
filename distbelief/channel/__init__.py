# SPDX-License-Identifier: Apache-2.0
"""How calls and tensors travel between roles.

base          what a call is: exported methods, futures, remotes
futures       the answer to a call, a promise, work beside the role
frames        bytes on a socket
authenticate  both sides prove knowledge of the job's key before anything is parsed
memory        memory shared with other processes of this host, without names
place         where a role answers, on its own host and for others
links         sockets before and below frames
codec         numbers in the body of a frame
secure        TLS between hosts
staging       where bodies are received
loan          a role's own memory, sent as it is unless it changes first
wire          what a job can choose of all this
second_stream half of each large body, by a thread of its own
connection    one socket: frames in, frames out, tensors without copies
spin          looking for a moment before sleeping
watch         which sockets are ready
background    a thread that polls while its owner computes
door          who comes in, and who is refused
widening      how connections come to a second stream
endpoint      all connections of one process
desk          the role that answers on them
peer          a role, as its callers see it
mailbox       parcels between partitions of one host, beside all this
"""
