// SPDX-License-Identifier: Apache-2.0
/* Nanoseconds for one vmfork_forked() and for one plain atomic load, side by side: one line of both per round. */
#define _GNU_SOURCE
#include <time.h>

#include "vmfork.h"

enum { CALLS = 20000000 };

static double now(void)
{
	struct timespec moment;

	clock_gettime(CLOCK_MONOTONIC, &moment);
	return (double)moment.tv_sec * 1e9 + (double)moment.tv_nsec;
}

int main(int argc, char **argv)
{
	static uint64_t word = 1;
	static vmfork_guard guard;
	int rounds = argc > 1 ? atoi(argv[1]) : 5, found = 0;
	double begin, middle, end;

	if (!vmfork_guard_init(&guard))
		return 1;
	while (rounds-- > 0) {
		begin = now();
		for (int i = 0; i < CALLS; i++)
			found += vmfork_forked(&guard);
		middle = now();
		for (int i = 0; i < CALLS; i++)
			found += __atomic_load_n(&word, __ATOMIC_ACQUIRE) != 1;
		end = now();
		printf("%.4f %.4f\n", (middle - begin) / CALLS, (end - middle) / CALLS);
	}
	return found;
}
