# SPDX-License-Identifier: Apache-2.0
"""Where roles live and die.

base       the seam: Home (what a role sees) and Engine (what starts and stops roles)
home       a role's process, as the role sees it
zygote     the process from which the roles of one host are forked
nursery    a zygote and its roles, as their owner sees them
local      processes of this machine
hosts      processes of several hosts, each with a keeper
host       the keeper of a host
registry   where roles are and which hosts are there, for keepers and roles
lease      until when the roles of a host may speak
placement  what a job asks of a cluster
ray        Ray as who finds hosts and starts keepers
simulated  every role in this process, one at a time, under a virtual clock
"""
