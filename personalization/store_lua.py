"""The store's keys and its transitions: each transition is one Lua call and happens whole or not at all.

A person's keys are `attune:user:<adapter id>:<part>`; no key holds a name or a text that a person chose,
except a conversation's id at its very end. What survives `forget` is `attune:life:<adapter id>`: how often
the person was forgotten (`epoch`) and when last (`forgotten`), the last version number given out (`version`),
and its value at the last forget (`floor`). Work begun before a forget carries an older epoch, a moment before
it, or a version at or below the floor: it is refused.
"""

USERS = "attune:users"  # hash: adapter id → user
UPDATES = "attune:updates"  # pub/sub: JSON messages with a `type`
RUNNING_RESPONSES = "attune:responses:running"  # set of response ids
USER_PREFIX = "attune:user:"
LIFE_PREFIX = "attune:life:"  # hash: epoch, forgotten (microseconds), version, floor
RESPONSE_PREFIX = "attune:response:"  # hash; with ":events" a stream, with ":lease" a string that expires
TICKET_PREFIX = "attune:ticket:"  # string that expires

USER_PARTS = (
    "turns",  # hash: turn id → JSON, written once
    "order",  # sorted set: microseconds → "<sequence>:<turn id>"; equal times sort by sequence
    "sequence",  # counter
    "conversations",  # sorted set: microseconds of the last turn → conversation id
    "authors",  # hash: turn id → person | model | blank
    "ratings",  # hash: turn id → up | down
    "removed",  # hash: turn id → why: person | corrected
    "corrections",  # hash: corrected turn id → its newest correction's id
    "learned",  # set of turn ids to learn from
    "fresh",  # those of them that no refresh has seen
    "pointer",  # hash: version, updated_at, writer; during a trial also trial, share, since
    "versions",  # hash: version → JSON
    "trials",  # hash: version → JSON: how its trial ended
    "refresh",  # JSON: the newest progress of a refresh
    "responses",  # sorted set: expiry in ms → response id
)
CONVERSATION_PART = "conversation:"  # + conversation id; sorted set like `order`

# Of corrections of corrections, how many are followed: a file may have them in a circle, or in a chain so
# long that everybody would wait for the server.
MOST_LINKS = 16


def user_prefix(adapter_id: str) -> str:
    return f"{USER_PREFIX}{adapter_id}:"


def life_key(adapter_id: str) -> str:
    return f"{LIFE_PREFIX}{adapter_id}"


_NAMES = f"""
local USERS, UPDATES, RUNNING = '{USERS}', '{UPDATES}', '{RUNNING_RESPONSES}'
local RESPONSE, CONVERSATION = '{RESPONSE_PREFIX}', '{CONVERSATION_PART}'
"""

# `life` is the person's. A fence is the epoch that work began in; or @ and the microsecond it began at, where
# that could not be read; or nothing.
_FENCE = """
local function number(field) return tonumber(redis.call('HGET', life, field) or '0') end
local function stale(fence)
  if string.sub(fence, 1, 1) == '@' then return tonumber(string.sub(fence, 2)) <= number('forgotten') end
  return fence ~= '' and tonumber(fence) ~= number('epoch')
end
"""

# KEYS: the person's prefix, the person's life. Every part's key goes by the part's own name.
_PERSON = (
    _NAMES
    + "local prefix, life = KEYS[1], KEYS[2]\n"
    + "".join(f"local {part} = prefix .. '{part}'\n" for part in USER_PARTS)
    + f"local parts = {{{', '.join(USER_PARTS)}}}\n"
    + """
"""
    + _FENCE
    + """
-- Keeps `learned` and `fresh` equal to what history.learned says of the turn.
local function settle(id)
  local author, rating = redis.call('HGET', authors, id), redis.call('HGET', ratings, id)
  local learn = redis.call('HEXISTS', removed, id) == 0 and rating ~= 'down'
    and (author == 'person' or (author == 'model' and rating == 'up'))
  if not learn then
    redis.call('SREM', learned, id)
    redis.call('SREM', fresh, id)
  elseif redis.call('SADD', learned, id) == 1 then
    redis.call('SADD', fresh, id)
  end
end
"""
)

# ARGV: fence, user, adapter id, then 8 per turn: id, microseconds, conversation, JSON, author, rating,
# removed, corrects. → number of new turns, or -1 after a forget.
APPEND = (
    _PERSON
    + f"local MOST_LINKS = {MOST_LINKS}\n"
    + """
if stale(ARGV[1]) then return -1 end
local added = 0
for i = 4, #ARGV, 8 do
  local id, at, where, original = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 7]
  if redis.call('HSETNX', turns, id, ARGV[i + 3]) == 1 then
    added = added + 1
    local member = string.format('%012d:%s', redis.call('INCR', sequence), id)
    redis.call('ZADD', order, at, member)
    redis.call('ZADD', prefix .. CONVERSATION .. where, at, member)
    redis.call('ZADD', conversations, 'GT', at, where)
    redis.call('HSET', authors, id, ARGV[i + 4])
    if ARGV[i + 5] ~= '' then redis.call('HSET', ratings, id, ARGV[i + 5]) end
    if ARGV[i + 6] ~= '' then redis.call('HSET', removed, id, 'person') end
    if original ~= '' and ARGV[i + 6] ~= '' then  -- brought along as one that no longer counts
      redis.call('HSETNX', removed, original, 'corrected')
      settle(original)
      redis.call('HSETNX', corrections, original, id)
    elseif original ~= '' then
      local old, left = original, MOST_LINKS
      while old and left > 0 do
        left = left - 1
        redis.call('HSETNX', removed, old, 'corrected')
        settle(old)
        old = redis.call('HGET', corrections, old)
      end
      redis.call('HSET', corrections, original, id)
    end
    settle(id)
  end
end
if added > 0 then redis.call('HSET', USERS, ARGV[3], ARGV[2]) end
return added
"""
)

# ARGV: turn id, rating or ''. → 1, or 0 for an unknown turn.
RATE = (
    _PERSON
    + """
local id, rating = ARGV[1], ARGV[2]
if redis.call('HEXISTS', turns, id) == 0 then return 0 end
if rating == '' then redis.call('HDEL', ratings, id) else redis.call('HSET', ratings, id, rating) end
settle(id)
return 1
"""
)

# ARGV: turn id. → 1, or 0 for an unknown turn.
REMOVE = (
    _PERSON
    + """
if redis.call('HEXISTS', turns, ARGV[1]) == 0 then return 0 end
redis.call('HSET', removed, ARGV[1], 'person')
settle(ARGV[1])
return 1
"""
)

# ARGV: epoch, turn ids. → how many of them were fresh, or -1.
MARK_REFRESHED = (
    _PERSON
    + """
if stale(ARGV[1]) then return -1 end
local seen = 0
for i = 2, #ARGV do seen = seen + redis.call('SREM', fresh, ARGV[i]) end
return seen
"""
)

# Lua: a version on trial, if any, is so no longer; `said` is how that came about.
_END_TRIAL = """
local function end_trial(said)
  local tried = redis.call('HGET', pointer, 'trial')
  if not tried then return end
  redis.call('HSET', trials, tried, said)
  redis.call('HDEL', pointer, 'trial', 'share', 'since')
end
"""

# ARGV: epoch, expected, new, microseconds, writer (one per call), user, adapter id, message, the version that
# must be on trial or '', how a trial ends by this. → 1 moved, 0 not. The writer's name makes the same call,
# repeated because its reply was lost, the same success.
COMPARE_AND_SET = (
    _PERSON
    + _END_TRIAL
    + """
local new, writer = tonumber(ARGV[3]), ARGV[5]
if stale(ARGV[1]) or (new ~= 0 and new <= number('floor')) then return 0 end
local version = tonumber(redis.call('HGET', pointer, 'version') or '0')
if version == new and redis.call('HGET', pointer, 'writer') == writer then return 1 end
if version ~= tonumber(ARGV[2]) then return 0 end
if ARGV[9] ~= '' and redis.call('HGET', pointer, 'trial') ~= ARGV[9] then return 0 end
end_trial(ARGV[10])
redis.call('HSET', pointer, 'version', new, 'updated_at', ARGV[4], 'writer', writer)
if new > number('version') then redis.call('HSET', life, 'version', new) end
redis.call('HSET', USERS, ARGV[7], ARGV[6])
redis.call('PUBLISH', UPDATES, ARGV[8])
return 1
"""
)

# ARGV: epoch, expected, the version to try, its share, microseconds, writer (one per call), user, adapter id,
# message, how a trial ends by this, the version that may be on trial by then or ''. → 1 begun, 0 not.
BEGIN_TRIAL = (
    _PERSON
    + _END_TRIAL
    + """
local try, writer = tonumber(ARGV[3]), ARGV[6]
if stale(ARGV[1]) or try <= number('floor') then return 0 end
if redis.call('HGET', pointer, 'trial') == ARGV[3] and redis.call('HGET', pointer, 'writer') == writer then
  return 1
end
if (redis.call('HGET', pointer, 'version') or '0') ~= ARGV[2] then return 0 end
local tried = redis.call('HGET', pointer, 'trial')
if tried and tried ~= ARGV[11] then return 0 end
end_trial(ARGV[10])
redis.call('HSET', pointer, 'version', ARGV[2], 'trial', try, 'share', ARGV[4], 'since', ARGV[5])
redis.call('HSET', pointer, 'writer', writer)
if try > number('version') then redis.call('HSET', life, 'version', try) end
redis.call('HSET', USERS, ARGV[8], ARGV[7])
redis.call('PUBLISH', UPDATES, ARGV[9])
return 1
"""
)

# ARGV: epoch, the version that must be on trial, how it ends, message. → 1 ended, 0 not.
END_TRIAL = (
    _PERSON
    + _END_TRIAL
    + """
if stale(ARGV[1]) or redis.call('HGET', pointer, 'trial') ~= ARGV[2] then return 0 end
end_trial(ARGV[3])
redis.call('PUBLISH', UPDATES, ARGV[4])
return 1
"""
)

# ARGV: epoch. → the next version number, or -1.
NEXT_VERSION = (
    _PERSON
    + """
if stale(ARGV[1]) then return -1 end
return redis.call('HINCRBY', life, 'version', 1)
"""
)

# ARGV: epoch, version, JSON, user, adapter id. → 1 added, 0 there already, -1 after a forget.
ADD_VERSION = (
    _PERSON
    + """
local version = tonumber(ARGV[2])
if stale(ARGV[1]) or version <= number('floor') then return -1 end
if version > number('version') then redis.call('HSET', life, 'version', version) end
redis.call('HSET', USERS, ARGV[5], ARGV[4])
return redis.call('HSETNX', versions, version, ARGV[3])
"""
)

# ARGV: epoch, JSON to keep, milliseconds to keep it, message. → 1, or -1.
PROGRESS = (
    _PERSON
    + """
if stale(ARGV[1]) then return -1 end
redis.call('SET', refresh, ARGV[2], 'PX', ARGV[3])
redis.call('PUBLISH', UPDATES, ARGV[4])
return 1
"""
)

# ARGV: adapter id, message. → turns, conversations, versions, responses, keys, the new epoch.
FORGET = (
    _PERSON
    + """
local said, talks = redis.call('HLEN', turns), redis.call('ZRANGE', conversations, 0, -1)
local trained, replies, keys = redis.call('HLEN', versions), 0, 0
for _, id in ipairs(redis.call('ZRANGE', responses, 0, -1)) do
  local key = RESPONSE .. id
  local gone = redis.call('UNLINK', key, key .. ':events', key .. ':lease')
  redis.call('SREM', RUNNING, id)
  if gone > 0 then replies = replies + 1 end
  keys = keys + gone
end
for _, id in ipairs(talks) do keys = keys + redis.call('UNLINK', prefix .. CONVERSATION .. id) end
keys = keys + redis.call('UNLINK', unpack(parts))
redis.call('HDEL', USERS, ARGV[1])
local now = redis.call('TIME')
redis.call('HSET', life, 'floor', number('version'), 'forgotten', now[1] .. string.format('%06d', now[2]))
local epoch = redis.call('HINCRBY', life, 'epoch', 1)
redis.call('PUBLISH', UPDATES, ARGV[2])
return {said, #talks, trained, replies, keys, epoch}
"""
)

# KEYS: the response. `keep` lets it live so long from now, and tells the person's list of responses.
_RESPONSE = (
    _NAMES
    + """
local record, events, lease = KEYS[1], KEYS[1] .. ':events', KEYS[1] .. ':lease'
local function lost(holder)
  local held = redis.call('GET', lease)
  return held and held ~= holder
end
local function keep(id, ms)
  local now = redis.call('TIME')[1] * 1000
  local responses = redis.call('HGET', record, 'list')
  redis.call('ZREMRANGEBYSCORE', responses, '-inf', now - 60000)
  redis.call('ZADD', responses, now + ms, id)
  redis.call('PEXPIRE', record, ms)
  redis.call('PEXPIRE', events, ms)
end
"""
)

# KEYS[2]: the person's `responses`, KEYS[3]: the person's life. ARGV: fence, id, user, state, body, holder,
# lease in ms, time to live in ms, writer (one per call). → 1 made, 0 there already, -1 after a forget.
CREATE_RESPONSE = (
    _RESPONSE
    + """
local id, life = ARGV[2], KEYS[3]
"""
    + _FENCE
    + """
if stale(ARGV[1]) then return -1 end
if redis.call('EXISTS', record) == 1 then
  return redis.call('HGET', record, 'writer') == ARGV[9] and 1 or 0
end
redis.call('HSET', record, 'user', ARGV[3], 'state', ARGV[4], 'body', ARGV[5], 'list', KEYS[2])
redis.call('HSET', record, 'writer', ARGV[9])
redis.call('SET', lease, ARGV[6], 'PX', ARGV[7])
redis.call('SADD', RUNNING, id)
keep(id, ARGV[8])
return 1
"""
)

# ARGV: id, holder, time to live in ms, most events kept, first number, events. → 1, 0 unknown, -1 lease lost.
# Events that are there already (the call repeated because its reply was lost) stay as they are.
APPEND_RESPONSE = (
    _RESPONSE
    + """
if redis.call('EXISTS', record) == 0 then return 0 end
if lost(ARGV[2]) then return -1 end
local newest = redis.call('XREVRANGE', events, '+', '-', 'COUNT', 1)[1]
local last = newest and tonumber(string.match(newest[1], '^%d+')) or 0
for i = 6, #ARGV do
  local place = tonumber(ARGV[5]) + i - 5
  if place > last then
    redis.call('XADD', events, 'MAXLEN', ARGV[4], string.format('%d-0', place), 'e', ARGV[i])
  end
end
keep(ARGV[1], ARGV[3])
return 1
"""
)

# ARGV: id, holder, state, body, time to live in ms. → 1, 0 unknown, -1 lease lost.
FINISH_RESPONSE = (
    _RESPONSE
    + """
if redis.call('EXISTS', record) == 0 then return 0 end
if lost(ARGV[2]) then return -1 end
redis.call('HSET', record, 'state', ARGV[3], 'body', ARGV[4])
redis.call('UNLINK', lease)
redis.call('SREM', RUNNING, ARGV[1])
keep(ARGV[1], ARGV[5])
return 1
"""
)

# ARGV: id, holder, lease in ms. → 1 held now, 0 not: held by another, finished, or gone.
CLAIM_RESPONSE = (
    _RESPONSE
    + """
if redis.call('EXISTS', record) == 0 then
  redis.call('SREM', RUNNING, ARGV[1])
  return 0
end
if redis.call('SISMEMBER', RUNNING, ARGV[1]) == 0 or lost(ARGV[2]) then return 0 end
redis.call('SET', lease, ARGV[2], 'PX', ARGV[3])
return 1
"""
)
