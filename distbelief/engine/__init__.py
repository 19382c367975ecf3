# SPDX-License-Identifier: Apache-2.0
"""Where roles live and die.

base       the seam: Home (what a role sees) and Engine (what starts and stops roles)
home       a role's process, as the role sees it
listener   sockets that outlive who answers on them
insistent  calls that are made again until they are answered
pickles    how the job reaches a zygote
user_code  how the user's functions do
script     deaths and silences by script
zygote     the process from which the roles of one host are forked
forks      what its forks do first
trial      one mini-batch before any role is forked
nursery    a zygote and its roles, as their owner sees them
local      processes of this machine
hosts      processes of several hosts, each with a keeper
host       the keeper of a host
keeper     the process that it is
registry   where roles are and which hosts are there, for keepers and roles
lease      until when the roles of a host may speak
placement  what a job asks of a cluster
ray        Ray as who finds hosts and starts keepers
ray_connection  this process's connection to it
reaper     removes what a Ray begun for one job leaves
simulated  every role in this process, one at a time, under a virtual clock
virtual    that clock, and what waits for it
"""
