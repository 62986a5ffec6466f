/* The team: several threads that do one piece of work together.
 *
 * A piece is divided into parts of whole items, and the result of an item depends only on the item, so
 * results are the same on any number of threads. Threads take parts one by one: a thread whose processor
 * is busy with another program takes few. A waiting thread polls for a moment, since the next piece
 * usually follows soon, and then sleeps: a spinning processor would prevent the scheduler from moving
 * another thread of the team onto it.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "steps.h"

enum { MOST_HELPERS = 7, LOOKS = 400, PART = 1 << 14, SHARES = 2, TURN_SHIFT = 32 };

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() sched_yield()
#endif

static struct {
    /* The turn number in the upper half, the next part in the lower: a part is taken by one atomic
     * exchange, which fails if a new turn has begun since the work was read. */
    atomic_ulong ticket;
    _Atomic(Work *) work;
    _Atomic(const void *) what;
    atomic_long items, each, parts, active;
    atomic_long finished;
    atomic_int asleep;
    atomic_bool awaited; /* true while the caller sleeps until all parts are done */
    atomic_flag taken;
    pthread_mutex_t lock;
    pthread_cond_t begun, done;
    int helpers, wanted; /* existing and requested */
} team = {.taken = ATOMIC_FLAG_INIT,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .begun = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

static unsigned long turn_of(unsigned long ticket)
{
    return ticket >> TURN_SHIFT;
}

/* Take parts of the work until none is left; returns the last turn seen. */
static unsigned long take_parts(long number)
{
    for (;;) {
        unsigned long ticket = atomic_load(&team.ticket);
        long part = (long)(ticket & 0xffffffff), parts = atomic_load(&team.parts);
        Work *work = atomic_load(&team.work);
        const void *what = atomic_load(&team.what);
        Size items = atomic_load(&team.items), each = atomic_load(&team.each);
        if (part >= parts || number >= atomic_load(&team.active)) {
            return turn_of(ticket);
        }
        if (!atomic_compare_exchange_strong(&team.ticket, &ticket, ticket + 1)) {
            continue;
        }
        Size from = part * each, to = from + each;
        work(what, from, to < items ? to : items);
        if (atomic_fetch_add(&team.finished, 1) + 1 == parts && atomic_load(&team.awaited)) {
            pthread_mutex_lock(&team.lock);
            pthread_cond_signal(&team.done);
            pthread_mutex_unlock(&team.lock);
        }
    }
}

static void *help(void *number)
{
    unsigned long seen = 0;
    for (;;) {
        for (int looks = 0; turn_of(atomic_load(&team.ticket)) == seen; looks++) {
            if (looks < LOOKS) {
                sched_yield();
                continue;
            }
            pthread_mutex_lock(&team.lock);
            atomic_fetch_add(&team.asleep, 1);
            while (turn_of(atomic_load(&team.ticket)) == seen) {
                pthread_cond_wait(&team.begun, &team.lock);
            }
            atomic_fetch_sub(&team.asleep, 1);
            pthread_mutex_unlock(&team.lock);
        }
        seen = take_parts((intptr_t)number);
    }
    return NULL;
}

/* After a fork, the child process has no helpers. */
static void forget_helpers(void)
{
    pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.begun, NULL);
    pthread_cond_init(&team.done, NULL);
    atomic_flag_clear(&team.taken);
    atomic_store(&team.asleep, 0);
    team.helpers = 0;
}

static void find_helpers(void)
{
    while (team.helpers < team.wanted) {
        pthread_t helper;
        if (pthread_create(&helper, NULL, help, (void *)(intptr_t)team.helpers) != 0) {
            team.wanted = team.helpers;
            return;
        }
        pthread_detach(helper);
        team.helpers++;
    }
}

/* Wait for the parts that others have taken. */
static void await_parts(long parts)
{
    for (int looks = 0; atomic_load(&team.finished) < parts; looks++) {
        if (looks < 16 * LOOKS) {
            PAUSE();
            continue;
        }
        pthread_mutex_lock(&team.lock);
        atomic_store(&team.awaited, true);
        while (atomic_load(&team.finished) < parts) {
            pthread_cond_wait(&team.done, &team.lock);
        }
        atomic_store(&team.awaited, false);
        pthread_mutex_unlock(&team.lock);
    }
}

/* Do all items of the work, each about `size` arithmetic operations; without helpers if that is little,
 * or if another thread is using the team. */
static void parallel_for(Work *work, const void *what, Size items, Size size)
{
    Size each = size < PART ? PART / (size > 0 ? size : 1) : 1;
    /* Adjacent items are prefetched, so use no more parts than good load balancing needs. */
    Size most = items / (SHARES * (team.wanted + 1));
    each = each < most ? most : each;
    Size parts = items / each + (items % each != 0);
    if (parts < 2 || team.wanted < 1 || atomic_flag_test_and_set(&team.taken)) {
        if (items > 0) {
            work(what, 0, items);
        }
        return;
    }
    find_helpers();
    /* A turn in which no part can be taken, while the work is being set up. */
    unsigned long turn = turn_of(atomic_load(&team.ticket)) + 2;
    atomic_store(&team.ticket, (turn - 1) << TURN_SHIFT | 0xffffffff);
    atomic_store(&team.work, work);
    atomic_store(&team.what, what);
    atomic_store(&team.items, items);
    atomic_store(&team.each, each);
    atomic_store(&team.parts, parts);
    atomic_store(&team.active, team.wanted);
    atomic_store(&team.finished, 0);
    atomic_store(&team.ticket, turn << TURN_SHIFT);
    if (atomic_load(&team.asleep) > 0) {
        pthread_mutex_lock(&team.lock);
        pthread_cond_broadcast(&team.begun);
        pthread_mutex_unlock(&team.lock);
    }
    take_parts(-1);
    await_parts(parts);
    atomic_flag_clear(&team.taken);
}
