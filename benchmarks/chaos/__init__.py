"""The chaos suite: kills, full disks, hostile servers, damaged files and mistakes, all under the real command."""
