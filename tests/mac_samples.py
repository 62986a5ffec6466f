"""Outputs of macOS's commands from public reports, for its parsers.

Page counts are as reported; identifiers are shortened. The macOS versions are the reports' own;
"of the time of" marks reports that name a machine and a date, but no version. Until macOS 15
vm_stat's names are 31 columns wide, from macOS 26 on 36, and machines with memory tagging (M5) have
eleven more lines.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pages:
    """An output of vm_stat, and what must be read in it."""

    text: str
    page_bytes: int
    free: int
    """Free and speculative pages."""
    inactive: int
    total: int
    """Pages of the machine's whole memory."""


VM_STAT = {
    "Intel, of the time of macOS 14 (March 2024)": Pages(
        """\
Mach Virtual Memory Statistics: (page size of 4096 bytes)
Pages free:                             6127229.
Pages active:                            485320.
Pages inactive:                          628646.
Pages speculative:                       430715.
Pages throttled:                              0.
Pages wired down:                        715958.
Pages purgeable:                          11820.
"Translation faults":                  11477162.
Pages copy-on-write:                     356264.
Pages zero filled:                      7628050.
Pages reactivated:                         9561.
Pages purged:                              1423.
File-backed pages:                      1080348.
Anonymous pages:                         464333.
Pages stored in compressor:                   0.
Pages occupied by compressor:                 0.
Decompressions:                               0.
Compressions:                                 0.
Pageins:                                 280307.
Pageouts:                                     0.
Swapins:                                      0.
Swapouts:                                     0.
""",
        page_bytes=4096,
        free=6127229 + 430715,
        inactive=628646,
        total=32 * 2**30 // 4096,
    ),
    "Apple silicon, 24 GB, of the time of macOS 15 (November 2025), long in use": Pages(
        """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                3857.
Pages active:                            446206.
Pages inactive:                          443760.
Pages speculative:                         1075.
Pages throttled:                              0.
Pages wired down:                        181483.
Pages purgeable:                          17340.
"Translation faults":                8667427138.
Pages copy-on-write:                  156847509.
Pages zero filled:                   4902315421.
Pages reactivated:                    586001636.
Pages purged:                         174538344.
File-backed pages:                       294894.
Anonymous pages:                         596147.
Pages stored in compressor:             1943619.
Pages occupied by compressor:            442179.
Decompressions:                       591661242.
""",
        page_bytes=16384,
        free=3857 + 1075,
        inactive=443760,
        total=24 * 2**30 // 16384,
    ),
    "Apple silicon, 8 GB, the layout before macOS 26, swapping": Pages(
        """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                5076.
Pages active:                            107971.
Pages inactive:                          106508.
Pages speculative:                          844.
Pages throttled:                              0.
Pages wired down:                        111522.
Pages purgeable:                            429.
"Translation faults":                 717814376.
Pages copy-on-write:                   15925863.
Pages zero filled:                    150637465.
Pages reactivated:                    326258363.
Pages purged:                          11753388.
File-backed pages:                        70018.
Anonymous pages:                         145305.
Pages stored in compressor:              677154.
Pages occupied by compressor:            148632.
Decompressions:                       353417556.
Compressions:                         378186599.
Pageins:                               25988278.
Pageouts:                                690778.
Swapins:                               10554789.
Swapouts:                              11137186.
""",
        page_bytes=16384,
        free=5076 + 844,
        inactive=106508,
        total=8 * 2**30 // 16384,
    ),
    "M4, 16 GB, of the time of macOS 26": Pages(
        """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                    32257.
Pages active:                                 254966.
Pages inactive:                               240318.
Pages speculative:                             14083.
Pages throttled:                                   0.
Pages wired down:                             172591.
Pages purgeable:                               14672.
"Translation faults":                      218850525.
Pages copy-on-write:                        11360665.
Pages zero filled:                         145853813.
Pages reactivated:                           7483439.
Pages purged:                                1540816.
File-backed pages:                            181743.
Anonymous pages:                              327624.
Pages stored in compressor:                   639764.
Pages occupied by compressor:                 294851.
Decompressions:                              4668445.
Compressions:                                6377731.
Pageins:                                     5708256.
Pageouts:                                      51709.
Swapins:                                           0.
Swapouts:                                          0.
""",
        page_bytes=16384,
        free=32257 + 14083,
        inactive=240318,
        total=16 * 2**30 // 16384,
    ),
    "M5 Pro, 48 GB, September 2026, with memory tagging": Pages(
        """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                    35025.
Pages active:                                1116696.
Pages inactive:                               947360.
Pages speculative:                            171926.
Pages throttled:                                   0.
Pages wired down:                             222249.
Pages purgeable:                                 302.
"Translation faults":                    14110601914.
Pages copy-on-write:                       645562816.
Pages zero filled:                       16692371362.
Pages reactivated:                        2586508537.
Pages purged:                               63836165.
File-backed pages:                           1319934.
Anonymous pages:                              916048.
Pages stored in compressor:                  1650162.
Pages occupied by compressor:                 591421.
Decompressions:                            986859363.
Compressions:                             1282540747.
Pageins:                                  6208666268.
Pageouts:                                   10679421.
Swapins:                                    41718162.
Swapouts:                                   69922789.
Pages tagged:                                 169437.
Pages tagged resident:                        116759.
Pages tagged compressed:                       52678.
Pages tag-storage:                             98304.
Pages tag-storage holding tags:                 6839.
Pages tag-storage free:                          714.
Pages tag-storage non-tag pageable:            90743.
Pages tag-storage non-tag wired:                   8.
Bytes of compressed tags:                    8605504.
Tagged compressions:                         9734620.
Tagged decompressions:                       8961143.
""",
        page_bytes=16384,
        free=35025 + 171926,
        inactive=947360,
        total=48 * 2**30 // 16384,
    ),
}

SWAP = {
    "a report of 2020, in the form of today": (
        "total = 4096.00M  used = 2743.50M  free = 1352.50M",
        2743.5,
    ),
    "48 GB under load, 2026": ("total = 13312.00M  used = 11625.69M  free = 1686.31M", 11625.69),
    "none used": ("total = 0.00M  used = 0.00M  free = 0.00M", 0.0),
    "a German or Italian locale": ("total = 1024,00M  used = 379,25M  free = 644,75M", 379.25),
}
"""Values of vm.swapusage, with the MiB used. "  (encrypted)" follows each on Apple silicon."""

BATTERY = {
    "no battery, all versions (Mac mini, Studio)": ("Now drawing from 'AC Power'\n", False, None),
    "macOS 26.6.2": (
        "Now drawing from 'AC Power'\n -InternalBattery-0 (id=35192931)\t99%; finishing charge; "
        "0:00 remaining present: true\n",
        False,
        99,
    ),
    "macOS 27.0, plugged in": (
        "Now drawing from 'AC Power'\n -InternalBattery-0 (id=22806627)\t93%; charging; "
        "(no estimate) present: true\n",
        False,
        93,
    ),
    "macOS 27.0, just unplugged": (
        "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=22806627)\t90%; discharging; "
        "(no estimate) present: true\n",
        True,
        90,
    ),
    "2026, held at a charge limit": (
        "Now drawing from 'AC Power'\n -InternalBattery-0 (id=23265379)\t80%; AC attached; not "
        "charging present: true\n",
        False,
        80,
    ),
    "older ones have no id": (
        "Now drawing from 'Battery Power'\n -InternalBattery-0 \t9%; discharging; 0:21 remaining "
        "present: true\n",
        True,
        9,
    ),
    "a Mac mini on a UPS during an outage": (
        "Now drawing from 'UPS Power'\n -Back-UPS ES 700 (id=1234)\t87%; discharging; 0:45 "
        "remaining present: true\n",
        True,
        87,
    ),
    "a laptop beside a UPS: its own battery counts": (
        "Now drawing from 'Battery Power'\n -UPS-1500VA (id=1234)\t100%; charged; 0:00 remaining "
        "present: true\n -InternalBattery-0 (id=4653155)\t64%; discharging; 3:02 remaining "
        "present: true\n",
        True,
        64,
    ),
}
"""Outputs of pmset -g batt, with what they say: on battery, percent."""
