/* The team: one piece of work, done by several threads.
 *
 * A piece is at most some 100 us long and the next one follows soon, so helpers look out for it for
 * a while before they sleep, and let others run meanwhile. Parts are taken one by one: a helper
 * whose processor is busy with something else takes few.
 */
enum { MOST_HELPERS = 7, LOOKS = 400, PART = 1 << 14 };

/* Items from `from` to before `to` of some work. */
typedef void Work(const void *what, Py_ssize_t from, Py_ssize_t to);

static struct {
    Work *work;
    const void *what;
    Py_ssize_t items, each, parts;
    atomic_long next, finished;
    atomic_uint turn;  /* odd while there is work */
    atomic_int inside; /* helpers that may be looking at it */
    atomic_int asleep;
    atomic_flag taken;
    pthread_mutex_t lock;
    pthread_cond_t woken;
    int helpers, wanted; /* that there are, and that are asked for */
    int active;          /* that this work is for */
} team = {.taken = ATOMIC_FLAG_INIT,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .woken = PTHREAD_COND_INITIALIZER};

static void take_parts(void)
{
    for (;;) {
        long part = atomic_fetch_add(&team.next, 1);
        if (part >= team.parts) {
            return;
        }
        Py_ssize_t from = part * team.each, to = from + team.each;
        team.work(team.what, from, to < team.items ? to : team.items);
        atomic_fetch_add(&team.finished, 1);
    }
}

static void *help(void *number)
{
    unsigned seen = 0;
    for (;;) {
        for (int looks = 0; atomic_load(&team.turn) == seen; looks++) {
            if (looks < LOOKS) {
                sched_yield();
                continue;
            }
            pthread_mutex_lock(&team.lock);
            atomic_fetch_add(&team.asleep, 1);
            while (atomic_load(&team.turn) == seen) {
                pthread_cond_wait(&team.woken, &team.lock);
            }
            atomic_fetch_sub(&team.asleep, 1);
            pthread_mutex_unlock(&team.lock);
        }
        atomic_fetch_add(&team.inside, 1);
        seen = atomic_load(&team.turn);
        if (seen & 1 && (intptr_t)number < team.active) {
            take_parts();
        }
        atomic_fetch_sub(&team.inside, 1);
    }
    return NULL;
}

/* A child of a fork has no helpers. */
static void forget_helpers(void)
{
    pthread_mutex_init(&team.lock, NULL);
    pthread_cond_init(&team.woken, NULL);
    atomic_flag_clear(&team.taken);
    atomic_store(&team.turn, 0);
    atomic_store(&team.inside, 0);
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

/* Do all items of the work, of which one takes about `size` steps of arithmetic; alone where that is
 * little, or where another thread has the team. */
static void together(Work *work, const void *what, Py_ssize_t items, Py_ssize_t size)
{
    Py_ssize_t each = size < PART ? PART / (size > 0 ? size : 1) : 1;
    Py_ssize_t parts = items / each + (items % each != 0);
    if (parts < 2 || team.wanted < 1 || atomic_flag_test_and_set(&team.taken)) {
        work(what, 0, items);
        return;
    }
    find_helpers();
    team.active = team.wanted;
    team.work = work;
    team.what = what;
    team.items = items;
    team.each = each;
    team.parts = parts;
    atomic_store(&team.next, 0);
    atomic_store(&team.finished, 0);
    atomic_fetch_add(&team.turn, 1);
    if (atomic_load(&team.asleep) > 0) {
        pthread_mutex_lock(&team.lock);
        pthread_cond_broadcast(&team.woken);
        pthread_mutex_unlock(&team.lock);
    }
    take_parts();
    while (atomic_load(&team.finished) < parts) {
        sched_yield();
    }
    atomic_fetch_add(&team.turn, 1);
    while (atomic_load(&team.inside) > 0) {
        sched_yield();
    }
    atomic_flag_clear(&team.taken);
}
