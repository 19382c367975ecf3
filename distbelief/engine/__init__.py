# SPDX-License-Identifier: Apache-2.0
"""Where roles live and die.

base       the seam: Home (what a role sees) and Engine (what starts and stops roles)
local      processes of this machine
zygote     the process from which the local engine's processes are forked
simulated  every role in this process, one at a time, under a virtual clock
"""
