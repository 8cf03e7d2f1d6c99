// SPDX-License-Identifier: Apache-2.0
/* A hook that does nothing but leave the moment of its first instruction: CLOCK_MONOTONIC, ns, in a file beside it,
 * or beside what it is a symbolic link to. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct timespec moment;
	uint64_t ns;
	char path[4096];
	char *self;
	int fd;

	clock_gettime(CLOCK_MONOTONIC, &moment);
	ns = (uint64_t)moment.tv_sec * 1000000000u + (uint64_t)moment.tv_nsec;
	self = argc < 1 ? NULL : realpath(argv[0], NULL);
	if (!self || snprintf(path, sizeof(path), "%s.stamp", self) >= (int)sizeof(path))
		return 1;
	fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
	return fd < 0 || write(fd, &ns, sizeof(ns)) != (ssize_t)sizeof(ns);
}
