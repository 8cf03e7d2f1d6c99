// SPDX-License-Identifier: Apache-2.0
/* A hook that does nothing but leave the moment of its first instruction: CLOCK_MONOTONIC, ns, in a file beside it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct timespec moment;
	uint64_t ns;
	char path[4096];
	int fd;

	clock_gettime(CLOCK_MONOTONIC, &moment);
	ns = (uint64_t)moment.tv_sec * 1000000000u + (uint64_t)moment.tv_nsec;
	if (argc < 1 || snprintf(path, sizeof(path), "%s.stamp", argv[0]) >= (int)sizeof(path))
		return 1;
	fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
	return fd < 0 || write(fd, &ns, sizeof(ns)) != (ssize_t)sizeof(ns);
}
