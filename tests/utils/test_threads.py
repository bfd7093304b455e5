"""A thread has one token, and no other thread ever has it."""

import threading

from peftcore.utils.threads import this_thread


def test_threads_that_ended_hand_nothing_on() -> None:
    seen = [this_thread()]
    numbers = set()
    for _ in range(20):  # the system gives a number again and again
        thread = threading.Thread(target=lambda: (seen.append(this_thread()), numbers.add(threading.get_ident())))
        thread.start()
        thread.join()
    assert len({id(token) for token in seen}) == 21 > len(numbers) + 1 or len(set(seen)) == 21
    assert this_thread() is seen[0]
